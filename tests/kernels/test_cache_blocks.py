"""Attention over a cache in blocks is attention by its equation, and no row's result depends on another's length."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.kernels import KVCache, ScoreInputs, ScoreRule, cached_attention, reference_attention

pytestmark = pytest.mark.usefixtures("compute")
IN_C = pytest.mark.parametrize("compute", ["C++"], indirect=True)
B, N, K, H = 3, 4, 2, 8


def filled(slots, lasts, dtype="float32"):
    """A cache of two layers, the second of which holds `lasts` + 1 positions of each row; the rest is noise."""
    random = np.random.default_rng(0)
    cache = KVCache.empty(B, K, slots, H, dtype)
    k, v = (jnp.asarray(random.normal(size=(2, B, K, slots, H)), dtype) for _ in range(2))
    if cache.k.dtype == jnp.uint16:
        k, v = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (k, v))
    return replace(cache, k=k, v=v, layer=jnp.int32(1)), jnp.asarray(lasts, jnp.int32)[:, None]


def queries(last, count, dtype="float32"):
    q = jnp.asarray(np.random.default_rng(1).normal(size=(B, count, N, H)), dtype)
    return q, last - count + 1 + jnp.arange(count)


RULES = {
    "plain": (ScoreRule(0.3), {}),
    "capped": (ScoreRule(0.3, softcap=2.0), {}),
    "window": (ScoreRule(0.3, window=300), {}),
    "sinks": (ScoreRule(0.3), {"sinks": jnp.asarray([0.5, -1.0, 2.0, 0.0])}),
    "alibi": (ScoreRule(0.3), {"slopes": jnp.asarray([0.5, 0.25, 0.125, 0.0625])}),
}


@pytest.mark.parametrize("slots", [256, 300, 129])
@pytest.mark.parametrize("count", [1, 5, 50])
@pytest.mark.parametrize("rule", RULES)
def test_blocks_are_the_equation(rule, count, slots):
    rule, inputs = RULES[rule][0], ScoreInputs(**RULES[rule][1])
    lasts = (
        [max(4, count - 1), 128, slots - 1] if rule.window is None or count > 1 else [4, slots + 7, 2 * slots + 100]
    )  # a ring
    cache, last = filled(slots, lasts)
    q, positions = queries(last, count)
    found = cached_attention(q, cache, rule, inputs, positions, last, last.max())
    expected = reference_attention(q, *cache.read(), rule, inputs, positions, cache.positions(last))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@IN_C  # XLA compiles another program for another number of queries
@pytest.mark.parametrize("rule", RULES)
def test_a_query_is_the_same_to_the_bit_among_any_others(rule):
    rule, inputs = RULES[rule][0], ScoreInputs(**RULES[rule][1])
    cache, last = filled(300, [45, 170, 299])
    q, positions = queries(last, 40)
    whole = np.asarray(cached_attention(q, cache, rule, inputs, positions, last, last.max()))
    for token in (0, 7, 39):
        few = slice(token, token + 1)
        alone = cached_attention(q[:, few], cache, rule, inputs, positions[:, few], last, positions[:, few].max())
        np.testing.assert_array_equal(alone, whole[:, few])


@IN_C  # XLA gives numbers that nobody reads
def test_padding_and_free_slots_give_zeros():
    cache, last = filled(300, [45, 170, 299])
    q, positions = queries(last, 40)
    cut = last - jnp.asarray([[0], [13], [40]])  # so many at the end of each row are padding
    found = cached_attention(q, cache, ScoreRule(0.3), ScoreInputs(), positions, cut, cut.max())
    assert [int(row.any((1, 2)).sum()) for row in np.asarray(found) != 0] == [40, 27, 0]


def test_one_row_of_positions_may_stand_for_all():
    cache, last = filled(300, [40, 40, 40])
    q, positions = queries(last, 5)
    rule, inputs = ScoreRule(0.3), ScoreInputs()
    found = cached_attention(q, cache, rule, inputs, positions[:1], last[:1], last.max())
    expected = reference_attention(q, *cache.read(), rule, inputs, positions, cache.positions(last))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [-9, -1, 2])
def test_a_layer_beyond_the_stack_is_moved_into_it(layer):
    cache, last = filled(200, [45, 170, 199])
    q, positions = queries(last, 3)
    results = (
        cached_attention(
            q, replace(cache, layer=jnp.int32(at)), ScoreRule(0.3), ScoreInputs(), positions, last, last.max()
        )
        for at in (layer, 0 if layer == -9 else 1)
    )
    np.testing.assert_array_equal(*results)


def test_the_cache_may_keep_16_bits():
    cache, last = filled(256, [4, 128, 255], "bfloat16")
    q, positions = queries(last, 1, "bfloat16")
    found = cached_attention(q, cache, ScoreRule(0.3), ScoreInputs(), positions, last, last.max())
    assert found.dtype == jnp.bfloat16
    expected = reference_attention(q, *cache.read(), ScoreRule(0.3), ScoreInputs(), positions, cache.positions(last))
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (found, expected)), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("rule", ["plain", "sinks", "alibi"])
def test_a_row_is_the_same_to_the_bit_however_long_the_others_are(rule, count):
    rule, inputs = RULES[rule][0], ScoreInputs(**RULES[rule][1])
    attend = jax.jit(lambda *arrays: cached_attention(arrays[0], cache, rule, inputs, *arrays[1:]))
    results = []
    for others in (20, 200, 999):
        cache, last = filled(1000, [150, others, others])
        q, positions = queries(last, count)
        results.append(np.asarray(attend(q, positions, last, last.max())[0]))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_no_more_is_read_than_is_reached():
    cache, last = filled(1024, [100, 20, 7])
    cache = replace(cache, k=cache.k.at[..., 128:, :].set(jnp.nan), v=cache.v.at[..., 128:, :].set(jnp.nan))
    q, positions = queries(last, 1)
    assert np.isfinite(cached_attention(q, cache, ScoreRule(0.3), ScoreInputs(), positions, last, last.max())).all()
