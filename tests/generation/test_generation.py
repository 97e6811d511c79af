"""Decoding with a state against whole passes without one; what a text depends on, and what is compiled for it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.config import validate
from polygpt.errors import PolygptError, RequestError
from polygpt.generation import Engine, Request, Sampler, engine_for, run_all
from polygpt.generation.slots import CHUNK
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
    return run_requests(model, params, [Request(prompt, sampler=sampler, **settings) for prompt in prompts])


def run_requests(model, params, requests):
    handles = run_all(engine_of(model, params), requests, [None] * len(requests))
    return [handle.tokens for handle in handles], [handle.finish_reason for handle in handles]


def engine_of(model, params):
    """Every engine of a configuration has one shape: its programs are compiled once."""
    length = min(model.longest_sequence, 128)
    return Engine(model, params, slots=4, length=length, queue=100, chunk=16, cache_bytes=0)


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


WINDOWED = {"kind": "local", "num_heads": 2, "window": 6}
LINEAR = {"kind": "linear", "num_heads": 2}


@pytest.mark.parametrize(("attention", "position"), [(WINDOWED, "rope"), (WINDOWED, "alibi"), (LINEAR, "sinusoidal")])
def test_a_state_of_fixed_size_goes_past_the_context(attention, position):
    short, long = (
        Model(validate(ModelConfig, FIELDS | {"attention": attention, "position": position, "context_length": length}))
        for length in (16, 48)
    )
    params = jax.tree.map(lambda leaf: 5 * leaf, short.init(0))
    rows, reasons = run(short, params, [[1, 2, 3]], max_new_tokens=40)
    assert reasons == ["length"]
    assert rows == run(long, params, [[1, 2, 3]], max_new_tokens=40)[0]


def test_a_growing_cache_or_learned_positions_end_at_the_context():
    for changes in ({}, {"attention": WINDOWED, "position": "learned"}):
        model = Model(validate(ModelConfig, FIELDS | changes))
        assert model.longest_sequence == 48


def test_the_stop_token_ends_a_row_and_is_not_given(model, params, uncached):
    expected = uncached([1, 2, 3], 30)
    stop = expected[5]
    rows, reasons = run(model, params, [[1, 2, 3]], max_new_tokens=30, stop_tokens=(stop,))
    assert rows[0] == expected[: expected.index(stop)]
    assert reasons == ["stop"]


def test_the_last_tokens_of_a_full_context_are_right(model, params, uncached):
    """A state has as many slots as tokens are read: the last one is sampled and never read."""
    for length in (46, 47):
        rows, reasons = run(model, params, [[3] * length], max_new_tokens=9)
        assert rows == [uncached([3] * length, 48 - length)]
        assert reasons == ["context_length"]


def test_the_shape_of_an_engine_follows_from_its_requests(model, params):
    requests = [Request([1, 2, 3], 9), Request([1], 30)]
    engine = engine_for(model, params, requests)
    assert (engine.slots, engine.length) == (2, 48)
    with pytest.raises(RequestError, match="empty"):
        engine_for(model, params, [*requests, Request([], 3)])
    done = []
    run_all(engine, requests, [None, None], progress=lambda *counts: done.append(counts))
    assert done[-1] == (2, 2)
    assert [handle.finish_reason for handle in run_all(engine, requests[:1], [None])] == ["length"]


MIXED = [
    Request([1, 2, 3], 24, Sampler(), seed=5),
    Request([9], 30, Sampler(temperature=0.7, top_k=5), seed=6),
    Request(list(range(17)), 9, Sampler(temperature=1.3, top_p=0.8), seed=5),
    Request([4, 4], 20, GREEDY, seed=7, stop_tokens=(3, 11)),
]


def test_the_tokens_of_a_request_do_not_depend_on_its_neighbours_or_its_row(model, params):
    alone = [run_requests(model, params, [request])[0][0] for request in MIXED]
    for shift in range(4):
        order = [(row + shift) % 4 for row in range(4)]
        rows, _ = run_requests(model, params, [MIXED[number] for number in order])
        assert rows == [alone[number] for number in order]


def test_sampling_repeats_by_seed_and_differs_between_seeds(model, params):
    requests = [Request([1], 20, Sampler(), seed=seed) for seed in (1, 1, 2, 2**32 - 1)]
    rows, _ = run_requests(model, params, requests)
    assert rows[0] == rows[1]
    assert len({tuple(row) for row in rows}) == 3


def test_a_longer_generation_goes_on_as_a_shorter_one(model, params):
    """The key of a token is that of its position, wherever the prompt ends."""
    whole = run(model, params, [[1, 2]], Sampler(), max_new_tokens=20, seed=3)[0][0]
    for cut in (1, 7, 18):
        rest = run(model, params, [[1, 2, *whole[:cut]]], Sampler(), max_new_tokens=20 - cut, seed=3)[0][0]
        assert rest == whole[cut:]


def test_every_token_has_a_random_key_of_its_own():
    """Of a model whose logits are all equal, tokens are as different as their keys are."""
    model = Model(validate(ModelConfig, FIELDS | {"context_length": 128, "num_layers": 0}))
    params = jax.tree.map(jnp.zeros_like, model.init(0))
    tokens = run(model, params, [[1]], Sampler(), max_new_tokens=120, seed=0)[0][0]
    assert max(map(tokens.count, tokens)) < 20
    follows = set(itertools.pairwise(tokens))
    assert len(follows) > 80


def test_settings_are_data(model, params):
    """No new setting, seed, stop token or limit compiles anything."""
    engine = engine_of(model, params)
    engine.compile()
    compiled = [program._cache_size() for program in engine._runner._programs]
    for sampler in (GREEDY, Sampler(temperature=0.31), Sampler(top_k=7), Sampler(top_p=0.5, min_p=0.02)):
        for stops, seed, count in (((), 0, 24), ((5,), 1, 23), ((1, 2, 3), 2, 20)):
            run_all(engine, [Request([3, 2, 1], count, sampler, seed, stops)], [None])
    assert [program._cache_size() for program in engine._runner._programs] == compiled


def test_more_stop_tokens_than_there_is_room_for(model, params, uncached):
    expected = uncached([1, 2, 3], 30)
    stops = [token for token in range(29) if token not in expected[:6]]
    rows, reasons = run(model, params, [[1, 2, 3]], max_new_tokens=30, stop_tokens=tuple(stops))
    length = next(i for i, token in enumerate(expected) if token in stops)
    assert (rows[0], reasons) == (expected[:length], ["stop"])


@pytest.mark.parametrize("row", [0, 2])
def test_numbers_that_are_not_finite_are_an_error(model, params, row):
    """A NaN in the table of the tokens' embeddings, and of the head, which is tied to it."""
    broken = params | {"embedding": params["embedding"].at[row, 0].set(jnp.nan)}
    with pytest.raises(PolygptError, match="not finite"):
        run(model, broken, [[1, 3]], max_new_tokens=4)


def test_decoding_is_timed_and_reading_the_prompt_is_not(model, params):
    (handle,) = run_all(engine_of(model, params), [Request([1] * 9, CHUNK + 5, GREEDY)], [None])
    assert handle.decoded == CHUNK + 5
    assert 0 < handle.seconds < 5


@pytest.mark.parametrize(
    ("prompt", "count", "word"), [([], 4, "empty"), ([1] * 49, 4, "49"), ([29], 4, "29"), ([1], 0, "max_new_tokens")]
)
def test_impossible_prompts_are_refused(model, params, prompt, count, word):
    with pytest.raises(RequestError, match=word):
        run(model, params, [prompt], max_new_tokens=count)


def test_stop_tokens_that_no_token_has_stop_nothing(model, params):
    (plain,), _ = run(model, params, [[1, 2, 3]], max_new_tokens=12)
    odd = (2**32 + plain[4], 2**64, -1, 2**31)
    assert run(model, params, [[1, 2, 3]], max_new_tokens=12, stop_tokens=odd)[0] == [plain]
