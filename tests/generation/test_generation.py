"""The decode loop against decoding without a cache; what it depends on, and what is compiled for it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.config import validate
from polygpt.errors import PolygptError, RequestError
from polygpt.generation import Request, Sampler, engine, generate_tokens
from polygpt.generation.engine import _slots
from polygpt.generation.programs import CHUNK, programs_of
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
    rows, reasons = [[] for _ in requests], [None] * len(requests)
    for chunk in generate_tokens(model, params, requests):
        for i, (tokens, reason) in enumerate(chunk.pieces):
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


def test_the_slots_of_a_state_follow_from_the_longest_sequence(model, params):
    for length, slots in ((33, 32), (34, 48)):
        requests = [Request([1, 2, 3], length - 3)]
        progress = engine._prefill(model, params, requests, engine.settings_of(requests, 48))
        assert progress.state[0].attention.slots == slots


@pytest.mark.parametrize("count", [2, 3])
def test_a_state_has_as_many_slots_as_tokens_are_read(model, params, count):
    """The last of 17 tokens is never read, so 16 slots hold everything, and each of them is needed; 18 need more."""
    assert (_slots(16, 48), _slots(17, 48), _slots(33, 48)) == (16, 32, 48)
    prompts = np.random.default_rng(0).integers(0, 29, (64, 15))
    rows, _ = run(model, params, prompts.tolist(), max_new_tokens=count)
    seen = jnp.asarray(np.concatenate([prompts, np.array(rows)[:, :-1]], axis=1), jnp.int32)
    assert [row[-1] for row in rows] == model.logits(params, seen)[:, -1].argmax(-1).tolist()


def test_rows_are_decoded_up_to_their_limit(model, params):
    """And stand still there, while others go on."""
    requests = [Request([1], 3, GREEDY), Request([1, 2], 9, GREEDY)]
    settings = engine.settings_of(requests, 48)
    progress = engine._prefill(model, params, requests, settings)
    progress, tokens = programs_of(model.config).decode(params, progress, settings)
    assert progress.done.all()
    assert progress.position.tolist() == [3, 10]
    assert not tokens[:, 8:].any()


def test_a_prompt_may_be_padded_to_more_than_the_state_holds(model, params, uncached):
    prompts = [list(range(17)), [3] * 47]  # read as 32 and 48 tokens
    assert run(model, params, prompts[:1], max_new_tokens=1)[0] == [uncached(prompts[0], 1)]
    assert run(model, params, prompts, max_new_tokens=1)[0] == [uncached(prompt, 1) for prompt in prompts]


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
    run_requests(model, params, MIXED[:1])
    programs = programs_of(model.config)
    compiled = programs.prefill._cache_size(), programs.decode._cache_size()
    for sampler in (GREEDY, Sampler(temperature=0.31), Sampler(top_k=7), Sampler(top_p=0.5, min_p=0.02)):
        for stops, seed, count in (((), 0, 24), ((5,), 1, 23), ((1, 2, 3), 2, 20)):
            run_requests(model, params, [Request([3, 2, 1], count, sampler, seed, stops)])
    assert (programs.prefill._cache_size(), programs.decode._cache_size()) == compiled


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


def test_decoding_is_timed_and_prefill_is_not(model, params):
    chunks = list(generate_tokens(model, params, [Request([1], CHUNK + 5, GREEDY)]))
    assert [len(chunk.pieces[0].tokens) for chunk in chunks] == [1, CHUNK, 4]
    assert chunks[0].seconds is None
    assert all(chunk.seconds > 0 for chunk in chunks[1:])


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
