"""The loss that is fast to differentiate against the plain one, whatever the number of chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.model import head


@pytest.mark.parametrize(
    ("rows", "vocab", "count"), [(24, 11, 1), (24, 2**22 // 4, 6), (7, 2**22, 7), (10, 2**21 // 2, 5)]
)
def test_chunks_are_equal_and_small_enough(rows, vocab, count, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert head._chunk_count(rows, vocab) == count


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("chunks", [1, 3, 7, 12])
def test_value_and_gradients_equal_the_plain_ones(chunks, cap, monkeypatch):
    monkeypatch.setattr(head, "_chunk_count", lambda rows, vocab: chunks)
    random = np.random.default_rng(0)
    hidden, weight = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((2, 12, 5), (5, 9)))
    targets, weights = jnp.asarray(random.integers(0, 9, (2, 12))), jnp.asarray(random.random((2, 12)), jnp.float32)

    def fast(hidden, weight):
        return 3 * head.weighted_nll(hidden, weight, targets, weights, cap)

    def plain(hidden, weight):
        logits = head.soft_cap(head.project_to_vocabulary(hidden, weight), cap)
        return 3 * (head.nll_of_logits(logits, targets) * weights).sum()

    found, expected = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, weight) for f in (fast, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), found, expected)


def test_chunks_stay_few_where_no_divisor_is_near(monkeypatch):
    monkeypatch.setattr(head.jax, "default_backend", lambda: "cpu")
    assert head._chunk_count(2048, 8192) == 4
    assert head._chunk_count(2039, 8192) == 4  # a prime: rows are padded
    assert head._chunk_count(16 * 257, 50257) < 100
