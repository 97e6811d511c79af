"""Mixtures: every prefix holds each source's share to within one window, and any window is found at once."""

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygpt.config import validate
from polygpt.data import DataConfig, Loader, MixedLoader
from polygpt.data.mixing import PERIOD, Mixture, Stage, whole_shares
from polygpt.errors import RequestError

WEIGHTS = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any)


@settings(deadline=None, max_examples=40)
@given(weights=WEIGHTS)
def test_every_prefix_holds_each_share_to_within_one_window(weights):
    mixture, counts = Mixture([Stage(0, weights)]), [0] * len(weights)
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    for n in range(2 * sum(weights) + 5):
        assert mixture.counts(n) == counts
        source, index = mixture.locate(n)
        assert index == counts[source]
        counts[source] += 1
        assert all(abs(count - (n + 1) * share) < 1 for count, share in zip(counts, shares, strict=True))


@pytest.mark.parametrize("weights", [[0.1, 0.2, 0.7], [1 / 3, 2 / 3], [123_456_789, 987_654_321, 5], [1.0]])
def test_weights_of_any_size_become_whole_shares(weights):
    shares = whole_shares(weights)
    assert sum(shares) <= PERIOD
    for weight, share in zip(weights, shares, strict=True):
        assert share / sum(shares) == pytest.approx(weight / sum(weights), abs=2 / PERIOD)
    assert whole_shares([0.1, 0.2, 0.7]) == [1, 2, 7]
    assert min(shares) >= 1


@settings(deadline=None, max_examples=40)
@given(data=st.data(), weights=WEIGHTS)
def test_a_source_at_its_limit_is_left_out_and_the_others_go_on(data, weights):
    limits = [data.draw(st.integers(0, 30) | st.none()) for _ in weights]
    if all(limit == 0 for limit, weight in zip(limits, weights, strict=True) if weight):
        with pytest.raises(RequestError, match="no source may be read"):
            Mixture([Stage(0, weights)], limits)
        return
    mixture, counts = Mixture([Stage(0, weights)], limits), [0] * len(weights)
    end = 150 if mixture.limit is None else mixture.limit
    for n in range(min(end, 150)):
        assert mixture.counts(n) == counts
        source, index = mixture.locate(n)
        assert index == counts[source]
        counts[source] += 1
        assert limits[source] is None or counts[source] <= limits[source]
    if mixture.limit is not None:
        assert mixture.counts(end) == [limit if weight else 0 for limit, weight in zip(limits, weights, strict=True)]
        with pytest.raises(IndexError):
            mixture.locate(end)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), first=WEIGHTS, start=st.integers(1, 60))
def test_from_a_stage_on_other_weights_hold_and_each_source_goes_on_where_it_was(data, first, start):
    second = data.draw(st.lists(st.integers(0, 20), min_size=len(first), max_size=len(first)).filter(any))
    limits = [data.draw(st.integers(1, 40) | st.none()) for _ in first]
    mixture = Mixture([Stage(0, first), Stage(start, second)], limits)
    alone, counts = Mixture([Stage(0, first)], limits), [0] * len(first)
    for n in range(150 if mixture.limit is None else min(mixture.limit, 150)):
        source, index = mixture.locate(n)
        assert index == counts[source]
        assert mixture.counts(n) == counts
        if n < start:
            assert (source, index) == alone.locate(n)
        else:
            assert second[source] > 0
        counts[source] += 1
    if limits == [None] * len(first):
        since = [a - b for a, b in zip(mixture.counts(start + 90), mixture.counts(start), strict=True)]
        assert all(abs(n - 90 * w / sum(second)) < 1 for n, w in zip(since, second, strict=True))


def test_a_stage_begins_at_its_step_and_is_part_of_what_a_run_reads(mixed):
    plain, staged = mixed([1, 1, 0]), mixed([1, 1, 0], stages=[Stage(4, [0, 1, 3])])
    for i in range(4):
        assert (plain.batch(i)["input"] == staged.batch(i)["input"]).all()
    assert [staged.mixture.locate(n)[0] for n in range(20, 28)].count(2) == 6
    others = [mixed([1, 1, 0], stages=[Stage(step, [0, 1, k])]) for step, k in ((4, 3), (5, 3), (4, 2))]
    assert len({loader.fingerprint for loader in (plain, *others)}) == 4
    assert others[0].fingerprint == staged.fingerprint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"stages": [{"from_step": 5, "weights": {"b": 1}}]},
            "stages: change the weights of sources, and there are none",
        ),
        ({"stages": [{"from_step": 5, "weights": {"bb": 1}}]}, "no source is called 'bb'"),
        ({"stages": [{"from_step": 5, "weights": {"b": 0, "a": 0}}]}, "stages.0.weights: sum to 0"),
        ({"stages": [{"from_step": 0, "weights": {"b": 1}}]}, "from_step"),
        ({"stages": [{"from_step": 5, "weights": {"b": -1}}]}, "weights"),
        (
            {"stages": [{"from_step": 5, "weights": {"b": 2}}, {"from_step": 5, "weights": {"b": 1}}]},
            "stages.1.from_step: 5 does not come after 5",
        ),
    ],
)
def test_stages_that_cannot_be_are_refused(fields, message):
    sources = {} if "none" in message else {"sources": [{"path": "a.txt"}, {"path": "b.txt"}]}
    with pytest.raises(RequestError, match=message):
        validate(DataConfig, {**sources, **fields})


def test_a_source_that_is_not_named_keeps_its_weight():
    config = validate(
        DataConfig,
        {
            "sources": [{"path": "a.txt", "weight": 3}, {"path": "b.txt"}],
            "stages": [{"from_step": 5, "weights": {"b": 2}}, {"from_step": 9, "weights": {"a": 0}}],
        },
    )
    assert config.weights() == [(0, [3, 1]), (5, [3, 2]), (9, [0, 2])]


def test_the_billionth_batch_is_found_in_under_a_second():
    begun = time.perf_counter()
    mixture = Mixture([Stage(0, [0.123456, 0.5, 0.376544, 0.0001])])
    source, index = mixture.locate(10**9 * 512)
    assert time.perf_counter() - begun < 1
    assert mixture.counts(10**9 * 512 + 1)[source] == index + 1


@pytest.mark.parametrize("weights", [[0], [0, 0.0]])
def test_weights_that_sum_to_nothing_are_refused(weights):
    with pytest.raises(RequestError, match="the weights sum to 0"):
        Mixture([Stage(0, weights)])


@pytest.fixture
def mixed(prepared):
    """`mixed(weights, epochs)`: a loader of three sources, and a source of each window that it reads."""
    shards = {
        name: prepared([f"{name} {i} " * 9 for i in range(count)], name=name, validation_fraction=0.3)
        for name, count in (("a", 20), ("b", 60), ("c", 40))
    }

    def make(weights, epochs=None, seed=3, stages=(), **options):
        options = {"context_length": 16, "batch_size": 5, "seed": seed, **options}
        stages = [Stage(0, weights), *stages]
        return MixedLoader({name: Loader(s.train, **options) for name, s in shards.items()}, stages, epochs)

    return make


def test_batch_i_is_a_function_of_seed_and_i(mixed):
    loader, again = mixed([0.5, 0.2, 0.3]), mixed([5, 2, 3])
    assert loader.fingerprint == again.fingerprint
    for i in (10**9, 3, 0):
        assert all((loader.batch(i)[key] == again.batch(i)[key]).all() for key in ("input", "target", "mask"))
    others = [mixed([1, 1, 1]), mixed([5, 2, 3], [2, None, None]), mixed([5, 2, 3], seed=4)]
    assert len({other.fingerprint for other in [loader, *others]}) == 4


def test_rows_are_those_of_each_source_in_its_own_order(mixed):
    loader = mixed([0.5, 0.2, 0.3])
    rows = np.concatenate([loader.batch(i)["input"] for i in range(40)])
    sources = [loader.mixture.locate(n)[0] for n in range(len(rows))]
    for k, part in enumerate(loader.loaders.values()):
        own = rows[[n for n, source in enumerate(sources) if source == k]]
        alone = np.concatenate([part.batch(i)["input"] for i in range(len(own) // 5 + 1)])
        assert (own == alone[: len(own)]).all()
    facts = loader.facts(40)
    assert facts["data a"].startswith("50.0% of windows, ")
    epochs = 100 / loader.loaders["a"].num_windows
    assert facts["data a"].endswith(f" {epochs:.2f} epochs")


def test_too_few_epochs_for_the_run_are_refused_with_the_steps_that_they_last(mixed):
    loader = mixed([1, 1, 1], [1, 1, 2.5])
    last = loader.mixture.limit // 5
    loader.facts(last)
    with pytest.raises(RequestError, match=f"last for {last} steps, training.steps is {last + 1}"):
        loader.facts(last + 1)
    loader.batch(last - 1)
    with pytest.raises(IndexError):
        loader.batch(last)


def test_documents_can_be_mixed_packed(mixed):
    loader = mixed([1, 2, 1], packing="documents", context_length=200)
    assert loader.batch(3)["segment_ids"].max() > 0
    assert "packing" in loader.facts(2)
