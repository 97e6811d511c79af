"""Scores, maps, lens and experts of a text, against the model's logits and against evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from polygpt.evaluation import Row, score_rows
from polygpt.inspection import attention_maps, decode_weights, expert_shares, logit_lens, pool_maps, score_tokens
from polygpt.model import model_of

IDS = np.random.default_rng(1).integers(0, zoo.VOCAB, 20).tolist()


@pytest.fixture(scope="module")
def mixed():
    """Three layers: windowed attention with experts, linear attention, a soft mixture."""
    model = model_of(zoo.config_of(zoo.Case({**zoo.CASES["pattern-with-a-rest"].changes, "num_layers": 3})))
    return model, zoo.lively(model)


@pytest.fixture(scope="module")
def plain():
    model = model_of(zoo.config_of(zoo.Case({"num_layers": 2, "vocab_padding": 3})))
    return model, zoo.lively(model)


def logprobs_of(model, params, ids):
    return np.asarray(jax.nn.log_softmax(jax.jit(model.logits)(params, jnp.asarray([ids], jnp.int32))))[0]


@pytest.mark.parametrize("count", [1, 2, 16, 17, 24])
def test_scores_are_those_of_the_logits(plain, count):
    ids = (IDS * 2)[:count]
    expected = logprobs_of(*plain, ids)
    found = score_tokens(*plain, ids, top=5)
    own = expected[np.arange(count - 1), ids[1:]]
    np.testing.assert_allclose(found.logprobs, own, rtol=1e-5)
    np.testing.assert_array_equal(found.ranks, (expected[:-1] > own[:, None]).sum(-1))
    probabilities = np.exp(expected)
    np.testing.assert_allclose(found.entropies, -(probabilities * np.maximum(expected, -1e4)).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(found.top_tokens, np.argsort(-expected, axis=-1, kind="stable")[:, :5])
    np.testing.assert_allclose(found.top_logprobs, -np.sort(-expected, axis=-1)[:, :5], rtol=1e-5)


def test_scores_are_those_of_evaluation(plain):
    model, params = plain
    rows = [Row(IDS[:-1], IDS[1:])]
    assert score_tokens(*plain, IDS).logprobs.sum() == pytest.approx(score_rows(model, params, rows)[0].log_likelihood)


def test_no_more_alternatives_than_tokens(plain):
    assert score_tokens(*plain, IDS, top=99).top_tokens.shape == (len(IDS), zoo.VOCAB)


def test_damaged_weights_are_an_error(plain):
    model, params = plain
    damaged = params | {"embedding": params["embedding"] * np.nan}
    with pytest.raises(Exception, match="not a finite number"):
        score_tokens(model, damaged, IDS)


def test_the_last_layer_of_the_lens_is_the_model(mixed):
    ids = IDS[:18]
    for start, count in ((3, 5), (17, 1)):
        rows = logit_lens(*mixed, ids, start, count, top=4)
        assert len(rows) == 3
        expected = logprobs_of(*mixed, ids)[start : start + count]
        np.testing.assert_array_equal(rows[-1].top_tokens, np.argsort(-expected, axis=-1, kind="stable")[:, :4])
        np.testing.assert_allclose(rows[-1].top_logprobs, -np.sort(-expected, axis=-1)[:, :4], rtol=1e-5)
        followed = count - (start + count == len(ids))
        own = expected[np.arange(followed), ids[start + 1 : start + 1 + followed]]
        np.testing.assert_allclose(rows[-1].logprobs[:followed], own, rtol=1e-5)
        assert np.isnan(rows[-1].logprobs[followed:]).all()
        assert (rows[-1].ranks[followed:] == -1).all()


def test_an_earlier_layer_of_the_lens_is_its_residual_through_norm_and_head(mixed):
    model, params = mixed
    tokens = jnp.asarray([IDS], jnp.int32)
    captured = model.hidden(params, tokens, capture={"residual": lambda value: value}).captured
    decoder = model.module(params)
    for layer, row in enumerate(logit_lens(*mixed, IDS, 2, 6, top=3)):
        logits = decoder.logits(decoder.normalize(captured[layer]["residual"]))[0, 2:8]
        expected = np.sort(np.asarray(jax.nn.log_softmax(logits)))[:, ::-1][:, :3]
        np.testing.assert_allclose(row.top_logprobs, expected, rtol=2e-5, atol=1e-6)


def test_attention_maps_are_the_weights_in_bytes(mixed):
    model, params = mixed
    tokens = jnp.asarray([IDS], jnp.int32)
    captured = model.hidden(params, tokens, capture={"attention": lambda value: value}).captured
    maps = attention_maps(*mixed, IDS)
    assert [layer.shape[0] for layer in maps] == [4, 2, 4]
    for layer, expected in zip(maps, captured, strict=True):
        weights = np.minimum(np.abs(expected["attention"][0]), 1)
        assert np.abs(decode_weights(layer) - weights).max() <= 0.004
    np.testing.assert_allclose(decode_weights(maps[0]).sum(-1), 1, atol=0.03)  # softmax
    assert not np.triu(maps[0], 1).any()


def test_pooled_maps_keep_the_largest_weight():
    maps = np.zeros((2, 10, 10), np.uint8)
    maps[0, 9, 0], maps[1, 4, 3] = 200, 100
    pooled = pool_maps(maps, 4)
    assert pooled.shape == (2, 4, 4)
    assert pooled[0, 3, 0] == 200
    assert pooled[1].max() == 100
    assert np.count_nonzero(pooled) == 2
    assert pool_maps(maps, 10) is maps


def test_experts_take_their_share(mixed):
    model, _ = mixed
    shares = expert_shares(*mixed, IDS)
    assert [None if layer is None else layer.shape for layer in shares] == [(20, 4), None, (20, 3)]
    assert (np.count_nonzero(shares[0], axis=1) == model.config.layers[0].feedforward.top_k).all()
    np.testing.assert_allclose(shares[2].sum(1), 1, rtol=1e-5)


def test_packed_weights_are_inspected_too(plain):
    model, params = plain
    packed = model.pack(params, "float32")
    np.testing.assert_allclose(score_tokens(model, packed, IDS).logprobs, score_tokens(*plain, IDS).logprobs, rtol=1e-4)
    for mine, other in zip(attention_maps(model, packed, IDS), attention_maps(*plain, IDS), strict=True):
        assert np.abs(mine.astype(int) - other).max() <= 1
