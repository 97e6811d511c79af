"""Beam search against exhaustive search, and against a slow version written with lists."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.config import validate
from polygpt.errors import PolygptError, RequestError
from polygpt.generation import BeamSettings, Request, search_beams
from polygpt.model import Model, ModelConfig

FIELDS = {
    "vocab_size": 5,
    "context_length": 24,
    "embed_dim": 8,
    "num_layers": 2,
    "position": "rope",
    "norm": "rmsnorm",
    "attention": {"kind": "softmax", "num_heads": 2, "num_kv_heads": 1},
    "feedforward": {"kind": "mlp", "mlp_dim": 8},
}
PROMPT, STOP = [1, 2, 3], 4


def lively(model, seed=0):
    random = np.random.default_rng(seed)

    def draw(info):
        return jnp.asarray((info.inputs is None) + 0.6 * random.standard_normal(info.shape), jnp.float32)

    return jax.tree.map(draw, model.parameters)


@pytest.fixture(scope="module")
def model():
    return Model(validate(ModelConfig, FIELDS))


@pytest.fixture(scope="module")
def params(model):
    return lively(model)


@pytest.fixture(scope="module")
def log_probs(model, params):
    """log P(token | prompt, ids before it), by whole passes; kept, since every search asks again."""
    forward, known = jax.jit(model.logits), {}

    def compute(ids):
        if ids not in known:
            padded = np.zeros((1, 24), np.int32)
            padded[0, : 3 + len(ids)] = [*PROMPT, *ids]
            known[ids] = np.asarray(jax.nn.log_softmax(forward(params, padded)[0, 2 + len(ids)]), np.float64)
        return known[ids]

    return compute


def total(log_probs, ids):
    return sum(log_probs(ids[:i])[token] for i, token in enumerate(ids))


def slow_search(log_probs, count, beams, penalty, early, groups=1, diversity=0.0):
    """The same search with lists of (ids, total)."""
    each = beams // groups
    live, ended, open_ = [[((), 0.0)] for _ in range(groups)], [[] for _ in range(groups)], [True] * groups
    for length in range(1, count + 1):
        taken = np.zeros(5)
        for g in range(groups):
            found = [(ids, t + log_probs(ids)[v], v) for ids, t in live[g] for v in range(5)]
            found.sort(key=lambda item: -(item[1] - diversity * taken[item[2]]))
            if open_[g]:
                ends = [((*ids, v), t / length**penalty) for ids, t, v in found[:each] if v == STOP or length == count]
                ended[g] = sorted(ended[g] + ends, key=lambda item: -item[1])[:each]
            live[g] = [((*ids, v), t) for ids, t, v in found if v != STOP][:each]
            for ids, _ in live[g]:
                taken[ids[-1]] += 1
            longest = count if early == "never" and penalty > 0 else length
            full = len(ended[g]) == each
            better = not full or live[g][0][1] / longest**penalty > ended[g][-1][1]
            open_[g] = open_[g] and better and not (full and early is True)
        if not any(open_):
            break
    return sorted(itertools.chain(*ended), key=lambda item: -item[1])


def search(model, params, count=4, n=None, **settings):
    request = Request(PROMPT, count, stop_tokens=(STOP,))
    (found,) = search_beams(model, params, [request], BeamSettings(n=n or settings["beams"], **settings))
    return found


def assert_same(found, expected):
    """`expected`: (ids with the stop token, score)."""
    whole = [(*beam.tokens, STOP) if beam.finish_reason == "stop" else tuple(beam.tokens) for beam in found]
    assert whole == [ids for ids, _ in expected]
    np.testing.assert_allclose([beam.score for beam in found], [score for _, score in expected], rtol=1e-5)


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
def test_with_enough_beams_it_is_exhaustive_search(model, params, log_probs, penalty):
    beams, count = 256, 4
    every = [(*ids, STOP) for length in range(count) for ids in itertools.product(range(4), repeat=length)]
    every += list(itertools.product(range(4), repeat=count))
    scored = [(ids, total(log_probs, ids) / len(ids) ** penalty) for ids in every]
    expected = sorted(scored, key=lambda item: -item[1])[:20]
    assert_same(search(model, params, beams=beams, n=20, length_penalty=penalty, early_stopping="never"), expected)


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("penalty", [-1.0, 0.5, 2.0])
def test_each_way_of_stopping(model, params, log_probs, penalty, early):
    found = search(model, params, count=12, beams=3, length_penalty=penalty, early_stopping=early)
    assert_same(found, slow_search(log_probs, 12, 3, penalty, early))


@pytest.mark.parametrize(("groups", "diversity"), [(2, 0.0), (2, 0.7), (4, 3.0)])
def test_diverse_groups(model, params, log_probs, groups, diversity):
    settings = {"beam_groups": groups, "diversity_penalty": diversity}
    found = search(model, params, count=12, beams=4, **settings)
    assert_same(found, slow_search(log_probs, 12, 4, 1.0, False, groups, diversity))


def test_groups_with_a_penalty_differ_more(model, params):
    same = search(model, params, count=8, beams=4, beam_groups=2)
    apart = search(model, params, count=8, beams=4, beam_groups=2, diversity_penalty=2.0)
    assert len({tuple(beam.tokens) for beam in same}) == 2
    assert len({tuple(beam.tokens) for beam in apart}) == 4


STATES = {
    "ring": {"attention": {"kind": "local", "num_heads": 2, "window": 4}},
    "recurrence": {"attention": {"kind": "linear", "num_heads": 2, "decay": True}},
    "pool": {"feedforward": {"kind": "soft_moe", "num_experts": 2, "slots_per_expert": 2, "mlp_dim": 8}},
}


@pytest.mark.parametrize("kind", STATES)
def test_every_kind_of_state_follows_its_beam(kind):
    """A state that stayed in its row would give other log probabilities than a pass over the whole sequence."""
    model = Model(validate(ModelConfig, FIELDS | STATES[kind]))
    params = lively(model, 1)
    found = search(model, params, count=12, beams=4, length_penalty=0.0)
    for beam in found:
        ids = [*PROMPT, *beam.tokens, *[STOP] * (beam.finish_reason == "stop")]
        steps = jax.nn.log_softmax(model.logits(params, jnp.asarray([ids])))[0]
        assert beam.score == pytest.approx(sum(float(steps[i - 1, ids[i]]) for i in range(3, len(ids))), rel=1e-4)


def test_the_search_ends_at_the_context(model, params):
    request = Request([1] * 20, 9, stop_tokens=())
    (found,) = search_beams(model, params, [request], BeamSettings(2, n=2))
    assert [(len(beam.tokens), beam.finish_reason) for beam in found] == [(4, "context_length")] * 2
    (full,) = search_beams(model, params, [Request([1] * 24, 9)], BeamSettings(2))
    assert [tuple(beam) for beam in full] == [([], 0.0, "context_length")]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"beams": 0}, "beams"),
        ({"beams": True}, "beams"),
        ({"beams": 4096}, "1024"),
        ({"beams": 2, "n": 3}, "n=3"),
        ({"beams": 4, "beam_groups": 3}, "groups"),
        ({"beams": 4, "diversity_penalty": 1.0}, "beam_groups"),
        ({"beams": 4, "beam_groups": 2, "diversity_penalty": -1.0}, "diversity_penalty"),
        ({"beams": 2, "length_penalty": float("nan")}, "length_penalty"),
        ({"beams": 2, "length_penalty": -5.1}, r"length_penalty must be a number in -5\.\.5"),
        ({"beams": 2, "early_stopping": "sometimes"}, "early_stopping"),
    ],
)
def test_settings_that_mean_nothing_are_refused(model, params, settings, word):
    with pytest.raises(RequestError, match=word):
        search_beams(model, params, [Request(PROMPT, 4)], BeamSettings(**settings))


@pytest.mark.parametrize("penalty", [-5.0, 5.0])
def test_scores_of_the_strongest_penalties_are_still_ranked(model, params, penalty):
    (found,) = search_beams(model, params, [Request(PROMPT, 20)], BeamSettings(3, length_penalty=penalty, n=3))
    scores = [beam.score for beam in found]
    assert len(set(scores)) == 3
    assert scores == sorted(scores, reverse=True)
    assert all(np.isfinite(scores))


def test_ids_beyond_the_tokenizers_are_never_taken(model, params):
    (found,) = search_beams(model, params, [Request(PROMPT, 3)], BeamSettings(20, n=20), vocab_size=2)
    assert {tuple(beam.tokens) for beam in found} == set(itertools.product(range(2), repeat=3))


def test_numbers_that_are_not_finite_are_an_error(model, params):
    broken = params | {"embedding": params["embedding"].at[1, 0].set(jnp.nan)}
    with pytest.raises(PolygptError, match="not finite"):
        search(model, broken, beams=3)
