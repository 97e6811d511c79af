"""Bias, penalties, n-grams and minimum length against their definitions; what nobody asks for changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.generation import Sampler
from polygpt.generation.penalties import History, edit_logits, stack_penalties
from polygpt.generation.sampling import filter_logits, stack_samplers

LOGITS = np.array([2.0, -1.0, 0.5, 3.0, -2.0, 1.0], np.float32)
TOKENS = [0, 1, 2, 0, 1, 3, 0, 1]  # the first three are the prompt


def edited(sampler, tokens=TOKENS, prompt=3, stops=(-1,), beside=None):
    """The logits of a row, beside another row that asks for everything, or for what `beside` says."""
    samplers = [sampler, beside or Sampler(no_repeat_ngram=3, presence_penalty=9.0, repetition_penalty=2.0)]
    padded = np.full((2, 12), 5, np.int32)  # what comes after the sequence counts for nothing
    padded[:, : len(tokens)] = tokens
    history = History(jnp.asarray(padded), jnp.full(2, len(tokens)), jnp.full(2, prompt))
    bias = np.zeros((2, 6), np.float32)
    for token, value in sampler.logit_bias.items():
        bias[0, token] = value
    rows = jax.jit(edit_logits)(
        jnp.asarray([LOGITS, LOGITS]), stack_penalties(samplers), history, jnp.asarray([stops, stops]), bias
    )
    return np.asarray(rows[0])


def test_nothing_asked_changes_nothing():
    for beside in (None, Sampler()):
        np.testing.assert_array_equal(edited(Sampler(temperature=0.3), beside=beside), LOGITS)


def test_repetition_counts_prompt_and_text():
    expected = LOGITS.copy()
    expected[[0, 2, 3]] /= 1.5
    expected[1] *= 1.5
    np.testing.assert_allclose(edited(Sampler(repetition_penalty=1.5)), expected, rtol=1e-6)


def test_presence_and_frequency_count_the_text_alone():
    expected = LOGITS - np.array([0.5, 0.5, 0, 0.5, 0, 0], np.float32)
    np.testing.assert_allclose(edited(Sampler(presence_penalty=0.5)), expected, rtol=1e-6)
    expected = LOGITS - 0.25 * np.array([2, 2, 0, 1, 0, 0], np.float32)
    np.testing.assert_allclose(edited(Sampler(frequency_penalty=0.25)), expected, rtol=1e-6)


def test_a_bias_is_added():
    found = edited(Sampler(logit_bias={4: 3.0, 0: -1.5}))
    np.testing.assert_allclose(found, LOGITS + np.array([-1.5, 0, 0, 0, 3.0, 0], np.float32))


@pytest.mark.parametrize("n", range(1, 6))
@pytest.mark.parametrize("seed", range(4))
def test_no_ngram_is_repeated(n, seed):
    tokens = np.random.default_rng(seed).integers(0, 3, 10).tolist()
    ngrams = {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}
    banned = [(*tokens[len(tokens) - n + 1 :], token) in ngrams for token in range(6)]
    assert np.isinf(edited(Sampler(no_repeat_ngram=n), tokens)).tolist() == banned


@pytest.mark.parametrize("n", [11, 2**20, 2**31 - 1])
def test_runs_longer_than_the_sequence_ban_nothing_and_take_no_time(n):
    np.testing.assert_array_equal(edited(Sampler(no_repeat_ngram=n), [1] * 10), LOGITS)


def test_where_all_tokens_are_banned_none_is():
    found = edited(Sampler(no_repeat_ngram=1), [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(found, LOGITS)


def test_stop_tokens_wait_for_the_minimum():
    early = edited(Sampler(min_new_tokens=6), stops=(3, -1))
    assert np.isinf(early).tolist() == [False, False, False, True, False, False]
    assert np.isfinite(edited(Sampler(min_new_tokens=5), stops=(3, -1))).all()


def test_the_temperature_comes_before_the_share():
    sampling = stack_samplers([Sampler(temperature=0.5, top_p=0.8)])
    assert np.isfinite(filter_logits(jnp.asarray([[3.0, 2.0, 1.0]]), sampling)).tolist() == [[True, False, False]]
    sampling = stack_samplers([Sampler(temperature=1.0, top_p=0.8)])
    assert np.isfinite(filter_logits(jnp.asarray([[3.0, 2.0, 1.0]]), sampling)).tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    "field",
    [
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e300},
        {"repetition_penalty": 1e-300},
        {"presence_penalty": 1e300},
        {"frequency_penalty": -1e300},
        {"logit_bias": {1: 1e300}},
        {"presence_penalty": float("nan")},
        {"no_repeat_ngram": -1},
        {"min_new_tokens": -1},
        {"logit_bias": {"a": 1.0}},
    ],
)
def test_impossible_settings_are_refused(field):
    with pytest.raises(RequestError, match=next(iter(field))):
        validate(Sampler, field)
