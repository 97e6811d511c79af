"""The loss that is fast to differentiate against the plain one, whatever the number of chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from polygpt import spec
from polygpt.config import validate
from polygpt.kernels import LogitRule, loss, nll_of_logits, project_to_vocabulary, weighted_nll
from polygpt.model import Model, ModelConfig


@pytest.mark.parametrize(
    ("rows", "vocab", "count"), [(24, 11, 1), (24, 2**22 // 4, 6), (7, 2**22, 7), (10, 2**21 // 2, 5)]
)
def test_chunks_are_equal_and_small_enough(rows, vocab, count, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert loss._chunk_count(rows, vocab) == count


@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(cap=2.0), LogitRule(2.0, padding=3)])
@pytest.mark.parametrize("chunks", [1, 3, 7, 12])
def test_value_and_gradients_equal_the_plain_ones(chunks, rule, monkeypatch):
    monkeypatch.setattr(loss, "_chunk_count", lambda rows, vocab: chunks)
    random = np.random.default_rng(0)
    hidden, weight = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((2, 12, 5), (5, 9)))
    targets, weights = (
        jnp.asarray(random.integers(0, 9 - rule.padding, (2, 12))),
        jnp.asarray(random.random((2, 12)), jnp.float32),
    )

    def fast(hidden, weight):
        return 3 * weighted_nll(hidden, weight, targets, weights, rule)

    def plain(hidden, weight):
        logits = rule.apply(project_to_vocabulary(hidden, weight))
        return 3 * (nll_of_logits(logits, targets) * weights).sum()

    found, expected = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, weight) for f in (fast, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), found, expected)


def test_padded_ids_never_come_and_change_nothing():
    plain = {**zoo.BASE, "vocab_size": 32, "logit_softcap": 3.0}
    small, padded = (
        Model(validate(ModelConfig, {**plain, **more})) for more in ({}, {"vocab_size": 37, "vocab_padding": 5})
    )
    params = small.init(0)
    wide = {**params, "embedding": jnp.pad(params["embedding"], [(0, 5), (0, 0)], constant_values=7.0)}
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 32, (2, 24), np.int32))
    logits = jax.jit(padded.logits)(wide, tokens)
    np.testing.assert_allclose(logits[..., :32], jax.jit(small.logits)(params, tokens), rtol=1e-6, atol=1e-6)
    assert (jax.nn.softmax(logits)[..., 32:] == 0).all()
    named = spec.name_parameters(wide, jax.tree.map(lambda info: info.axes, padded.parameters))
    expected = jax.jit(spec.logits, static_argnums=0)(padded.config, named, tokens)
    np.testing.assert_allclose(logits, expected.unwrap("batch", "sequence", "vocab"), rtol=1e-5, atol=1e-6)


def test_chunks_stay_few_where_no_divisor_is_near(monkeypatch):
    monkeypatch.setattr(loss.jax, "default_backend", lambda: "cpu")
    assert loss._chunk_count(2048, 8192) == 4
    assert loss._chunk_count(2039, 8192) == 4  # a prime: rows are padded
    assert loss._chunk_count(16 * 257, 50257) < 100
