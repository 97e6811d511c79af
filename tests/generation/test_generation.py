"""Samplers against their definitions; the decode loop against decoding without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.generation import Sampler, generate_tokens
from polygpt.generation.engine import CHUNK
from polygpt.model import Model, ModelConfig

FIELDS = {
    "vocab_size": 29,
    "context_length": 48,
    "embed_dim": 16,
    "num_layers": 2,
    "position": "rope",
    "norm": "rmsnorm",
    "attention": {"kind": "softmax", "num_heads": 2, "num_kv_heads": 1},
    "feedforward": {"kind": "glu", "mlp_dim": 16},
}
GREEDY = Sampler(temperature=0.0)


@pytest.fixture(scope="module")
def model():
    return Model(validate(ModelConfig, FIELDS))


@pytest.fixture(scope="module")
def params(model):
    random = np.random.default_rng(0)

    def draw(info):
        return jnp.asarray((info.inputs is None) + 0.5 * random.standard_normal(info.shape), jnp.float32)

    return jax.tree.map(draw, model.parameters)


def run(model, params, prompts, sampler=GREEDY, **settings):
    rows, reasons = [[] for _ in prompts], [None] * len(prompts)
    for chunk in generate_tokens(model, params, prompts, sampler, **settings):
        for i, (tokens, reason) in enumerate(chunk):
            assert reasons[i] is None or not tokens, "tokens after the end"
            rows[i] += tokens
            reasons[i] = reason or reasons[i]
    return rows, reasons


@pytest.fixture(scope="module")
def uncached(model, params):
    """Greedy decoding by whole passes over the sequence so far."""
    logits = jax.jit(model.logits)

    def decode(prompt, count):
        tokens = list(prompt)
        for _ in range(count):
            padded = np.zeros((1, 48), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(logits(params, padded)[0, len(tokens) - 1].argmax()))
        return tokens[len(prompt) :]

    return decode


def test_greedy_with_the_cache_equals_greedy_without(model, params, uncached):
    rows, reasons = run(model, params, [[1, 2, 3]], max_new_tokens=2 * CHUNK + 3)
    assert rows[0] == uncached([1, 2, 3], 2 * CHUNK + 3)
    assert reasons == ["length"]


def test_a_batch_of_unequal_prompts_equals_each_alone(model, params, uncached):
    prompts = [[4], [5, 6, 7, 8, 9], list(range(20))]
    rows, _ = run(model, params, prompts, max_new_tokens=10)
    assert rows == [uncached(prompt, 10) for prompt in prompts]


def test_the_end_of_the_context_is_a_stated_reason(model, params, uncached):
    rows, reasons = run(model, params, [[1] * 40, [1] * 48, [2, 3]], max_new_tokens=20)
    assert reasons == ["context_length", "context_length", "length"]
    assert [len(row) for row in rows] == [8, 0, 20]
    assert rows[0] == uncached([1] * 40, 8)


def test_the_stop_token_ends_a_row_and_is_not_given(model, params, uncached):
    expected = uncached([1, 2, 3], 30)
    stop = expected[5]
    rows, reasons = run(model, params, [[1, 2, 3]], max_new_tokens=30, stop_tokens=(stop,))
    assert rows[0] == expected[: expected.index(stop)]
    assert reasons == ["stop"]


def test_sampling_repeats_by_seed_and_differs_between_seeds_and_rows(model, params):
    sampler = Sampler(temperature=1.0)
    first, again, other = (run(model, params, [[1], [1]], sampler, max_new_tokens=20, seed=s)[0] for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[0] != first[1]


@pytest.mark.parametrize(
    ("prompt", "count", "word"), [([], 4, "empty"), ([1] * 49, 4, "49"), ([29], 4, "29"), ([1], 0, "max_new_tokens")]
)
def test_impossible_prompts_are_refused(model, params, prompt, count, word):
    with pytest.raises(RequestError, match=word):
        run(model, params, [prompt], max_new_tokens=count)


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": 0},
        {"min_p": 1.0},
        {"temperature": float("nan")},
    ],
)
def test_impossible_sampler_settings_are_refused(field):
    with pytest.raises(RequestError, match=next(iter(field))):
        validate(Sampler, field)


logit_rows = st.lists(st.floats(-8, 8, width=32, allow_subnormal=False), min_size=6, max_size=6)


@given(logit_rows, st.integers(1, 8), st.floats(0.05, 1), st.floats(0, 0.9))
@settings(max_examples=60, deadline=None)
def test_filters_keep_what_their_definitions_say(row, k, p, min_p):
    logits = np.asarray(row, np.float32)
    order = np.argsort(-logits, kind="stable")
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()

    kept = np.isfinite(Sampler(top_k=k).filter(jnp.asarray(logits)[None])[0])
    assert kept[order[:k]].all()
    assert (logits[kept] >= logits[order[min(k, 6) - 1]]).all()

    kept = np.isfinite(Sampler(top_p=p).filter(jnp.asarray(logits)[None])[0])
    mass = probabilities[kept].sum()
    assert mass >= p - 1e-5
    least = probabilities[kept].min()
    assert mass - least * (probabilities[kept] == least).sum() < p + 1e-5, "the set is not the smallest"

    kept = np.isfinite(Sampler(min_p=min_p).filter(jnp.asarray(logits)[None])[0])
    clear = np.abs(probabilities - min_p * probabilities.max()) > 1e-6
    assert (kept == (probabilities >= min_p * probabilities.max()))[clear].all()


def test_sampled_frequencies_are_the_probabilities():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))[None].repeat(20000, 0)
    drawn = Sampler(temperature=1.0).sample(logits, jax.random.key(0))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20000, [0.5, 0.3, 0.15, 0.05], atol=0.012)
    sharp = Sampler(temperature=0.5, top_p=0.9).sample(logits, jax.random.key(0))
    weights = np.asarray([0.25, 0.09, 0.0225, 0.0025]) / 0.365  # squared, as temperature 1/2 does
    assert set(np.unique(sharp)) == {0, 1}
    np.testing.assert_allclose((sharp == 0).mean(), weights[0] / (weights[0] + weights[1]), atol=0.012)
