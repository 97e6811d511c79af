"""Every way to score gives the numbers of the plain one: the full forward pass, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from polygpt.errors import PolygptError
from polygpt.evaluation import Row, score_continuations, score_rows, scoring, shapes
from polygpt.model import Model
from polygpt.model.attention import REGISTRY as ATTENTION

# Every kind of state, and of positions that go on where a state ends. (Decoding is tested for every model.)
CASES = [
    *(f"attention-{kind}" for kind in ATTENTION),
    *("feedforward-moe", "feedforward-causal_soft_moe", "position-learned", "alibi-capped-in-a-window", "scanned"),
]
# Two questions with shared contexts of unequal length, one of them asked twice; a pair of its own; one that is cut.
DRAW = np.random.default_rng(5).integers(0, zoo.VOCAB, 200).tolist()
CONTEXTS = [DRAW[:9], DRAW[20:23], DRAW[30:44], DRAW[50:90]]
PAIRS = [
    (CONTEXTS[0], DRAW[100:105]),
    (CONTEXTS[1], DRAW[105:106]),
    (CONTEXTS[0], DRAW[107:109]),
    (CONTEXTS[1], DRAW[110:117]),
    (CONTEXTS[2], DRAW[120:126]),
    (CONTEXTS[0], DRAW[130:131]),
    (CONTEXTS[3], DRAW[140:146]),
    (CONTEXTS[3], DRAW[146:152]),
    (CONTEXTS[0], DRAW[100:105]),
]


def naive(model, params):
    """(Σ ln p, greediness) of each of `PAIRS`, from the logits of whole rows."""
    length = model.config.context_length
    rows = [np.array([*context, *continuation])[-(length + 1) :] for context, continuation in PAIRS]
    padded = jnp.asarray([np.pad(row[:-1], (0, length + 1 - len(row))) for row in rows], jnp.int32)
    logits = jax.jit(model.logits)(params, padded)
    log_p = log_softmax(np.asarray(logits, np.float64), axis=-1)
    for number, (row, (_, continuation)) in enumerate(zip(rows, PAIRS, strict=True)):
        steps = np.arange(len(row) - 1 - len(continuation), len(row) - 1)
        found = log_p[number, steps]
        yield found[np.arange(len(steps)), continuation].sum(), (found.argmax(-1) == continuation).all()


@pytest.mark.parametrize("name", CASES)
def test_every_kind_scores_from_a_shared_context_as_row_by_row(name):
    config = zoo.config_of(zoo.Case(zoo.CASES[name].changes))
    model = Model(config)
    params = zoo.lively(model)
    expected = list(naive(model, params))
    shared = score_continuations(model, params, PAIRS)
    plain = score_rows(model, params, [scoring.row_of(*pair, config.context_length) for pair in PAIRS])
    for found in (shared, plain):
        sums = [score.log_likelihood for score in found]
        np.testing.assert_allclose(sums, [log_p for log_p, _ in expected], rtol=1e-4, atol=1e-4)
        assert [score.greedy for score in found] == [greedy for _, greedy in expected]


def test_weights_that_are_no_numbers_are_named():
    model = Model(zoo.config_of(zoo.Case({})))
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, zoo.lively(model))
    with pytest.raises(PolygptError, match="not a finite number"):
        score_rows(model, broken, [Row([1, 2, 3], [4])])


@given(st.lists(st.integers(0, 300), min_size=1, max_size=60), st.floats(0, 500))
def test_widths_hold_every_row_and_cost_no_more_than_one_or_all(lengths, price):
    def cost(chosen):
        return price * len(chosen) + sum(shapes.fitting(chosen, length) for length in lengths)

    found = shapes.widths(lengths, price)
    each = sorted({shapes.rounded(length) for length in lengths})
    assert found == sorted(set(found))
    assert found[-1] == each[-1]
    assert cost(found) <= min(cost(each[-1:]), cost(each)) + 1e-9


def test_progress_reaches_the_whole():
    model = Model(zoo.config_of(zoo.Case({})))
    told = []
    score_continuations(model, zoo.lively(model), PAIRS, lambda *counts: told.append(counts))
    assert told == sorted(told)
    assert told[-1] == (len(PAIRS), len(PAIRS))
