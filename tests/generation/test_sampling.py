"""Sampling against its definitions, and its settings as data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.generation import Sampler
from polygpt.generation.sampling import BLOCK, NOT_FINITE, filter_logits, sample, stack_samplers, token_keys

filtered = jax.jit(filter_logits)


def kept(logits, **fields):
    """Which tokens the filters of a sampler leave."""
    return np.isfinite(filtered(jnp.asarray(logits, jnp.float32)[None], stack_samplers([Sampler(**fields)]))[0])


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

    top_k = kept(logits, top_k=k)
    assert top_k[order[:k]].all()
    assert (logits[top_k] >= logits[order[min(k, 6) - 1]]).all()

    top_p = kept(logits, top_p=p)
    mass = probabilities[top_p].sum()
    assert mass >= p - 1e-5
    least = probabilities[top_p].min()
    assert mass - least * (probabilities[top_p] == least).sum() < p + 1e-5, "the set is not the smallest"

    likely = kept(logits, min_p=min_p)
    clear = np.abs(probabilities - min_p * probabilities.max()) > 1e-6
    assert (likely == (probabilities >= min_p * probabilities.max()))[clear].all()


def test_the_filters_agree_with_sorting_for_a_large_vocabulary():
    logits = np.random.default_rng(0).standard_normal(5000).astype(np.float32) * 4
    ordered = np.sort(logits)[::-1]
    np.testing.assert_array_equal(kept(logits, top_k=40), logits >= ordered[39])
    mass = np.cumsum(np.exp(ordered.astype(np.float64)))
    needed = int((mass < 0.9 * mass[-1]).sum())  # the last of the smallest set
    np.testing.assert_array_equal(kept(logits, top_p=0.9), logits >= ordered[needed])


def test_the_temperature_comes_before_top_p():
    assert kept([3.0, 2.0, 1.0], temperature=0.5, top_p=0.8).tolist() == [True, False, False]
    assert kept([3.0, 2.0, 1.0], top_p=0.8).tolist() == [True, True, False]


def test_top_p_counts_what_top_k_left():
    # Of the two likeliest the first has 2/3, of all three 1/2.
    logits = np.log([0.5, 0.25, 0.25 - 1e-3])
    assert kept(logits, top_k=2, top_p=0.6).tolist() == [True, False, False]
    assert kept(logits, top_p=0.6).tolist() == [True, True, False]


def test_each_row_has_settings_of_its_own():
    samplers = [
        Sampler(temperature=0.0),
        Sampler(),
        Sampler(temperature=0.7, top_k=3),
        Sampler(top_p=0.4),
        Sampler(temperature=2.0, min_p=0.2),
    ]
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((5, 40)) * 3, jnp.float32)
    together = filtered(logits, stack_samplers(samplers))
    for row in range(1, 5):
        alone = filtered(logits[row : row + 1], stack_samplers([samplers[row]]))[0]
        np.testing.assert_array_equal(together[row], alone)
    tokens = {
        int(sample(logits, stack_samplers(samplers), jax.random.split(jax.random.key(i), 5))[0]) for i in range(9)
    }
    assert tokens == {int(logits[0].argmax())}


def test_sampled_frequencies_are_the_probabilities():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))[None].repeat(20000, 0)
    drawn = Sampler(temperature=1.0).sample(logits, jax.random.key(0))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20000, [0.5, 0.3, 0.15, 0.05], atol=0.012)
    sharp = Sampler(temperature=0.5, top_p=0.9).sample(logits, jax.random.key(0))
    weights = np.asarray([0.25, 0.09, 0.0225, 0.0025]) / 0.365  # squared, as temperature 1/2 does
    assert set(np.unique(sharp)) == {0, 1}
    np.testing.assert_allclose((sharp == 0).mean(), weights[0] / (weights[0] + weights[1]), atol=0.012)


@pytest.mark.parametrize("vocab", [BLOCK - 1, BLOCK, 2 * BLOCK + 20])
def test_frequencies_over_blocks_of_the_vocabulary(vocab):
    """Pearson's chi-squared, whose mean is the number of tokens and whose deviation is the root of twice that."""
    count, likely = 50_000, np.arange(vocab) % 3 != 1  # of three blocks one is empty
    logits = np.where(likely, np.random.default_rng(0).normal(size=vocab), -np.inf)
    drawn = Sampler(temperature=0.7).sample(jnp.asarray(logits, jnp.float32)[None].repeat(count, 0), jax.random.key(0))
    counts = np.bincount(drawn, minlength=vocab)
    assert not counts[~likely].any()
    expected = np.exp(logits[likely] / 0.7)
    expected *= count / expected.sum()
    chi_squared = ((counts[likely] - expected) ** 2 / expected).sum()
    assert abs(chi_squared - likely.sum()) < 4 * (2 * likely.sum()) ** 0.5


@pytest.mark.parametrize("temperature", [1e-37, 2e-38, 1e-38, 1e-40, 1e-320])
def test_a_temperature_near_zero_is_greedy(temperature):
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((50, 30)) * 8, jnp.float32)
    np.testing.assert_array_equal(Sampler(temperature=temperature).sample(logits, jax.random.key(1)), logits.argmax(-1))


@pytest.mark.parametrize("top_p", [1e-37, 1e-40, 1e-300])
def test_a_top_p_near_zero_is_greedy(top_p):
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((50, 30)), jnp.float32)
    drawn = Sampler(temperature=1.0, top_p=top_p).sample(logits, jax.random.key(1))
    np.testing.assert_array_equal(drawn, logits.argmax(-1))


def test_a_huge_temperature_draws_evenly():
    logits = jnp.asarray([[0.0, 50.0, -50.0]]).repeat(3000, 0)
    counts = np.bincount(Sampler(temperature=1e300).sample(logits, jax.random.key(0)), minlength=3)
    np.testing.assert_allclose(counts / 3000, 1 / 3, atol=0.04)


def test_the_key_of_a_token_depends_on_seed_and_position_alone():
    seeds, positions = np.array([1, 2, 1, 2**32 - 1], np.uint32), np.array([5, 5, 6, 5], np.int32)
    keys = jax.random.key_data(token_keys(seeds, positions)).tolist()
    assert len({tuple(key) for key in keys}) == 4
    for row in range(4):
        alone = jax.random.key_data(token_keys(seeds[row : row + 1], positions[row : row + 1]))[0]
        assert alone.tolist() == keys[row]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_choose_no_token(temperature):
    rows = np.zeros((5, 4), np.float32)
    rows[0, 2], rows[1, 0], rows[2], rows[3, 1] = np.nan, np.inf, -np.inf, -np.inf
    tokens = np.asarray(Sampler(temperature=temperature).sample(jnp.asarray(rows), jax.random.key(0)))
    assert (tokens[:3] == NOT_FINITE).all()
    assert (tokens[3:] >= 0).all()  # a single logit of -inf is a token that never comes
