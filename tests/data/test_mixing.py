"""Mixtures: every prefix holds each source's share to within one window, and any window is found at once."""

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygpt.data import Loader, MixedLoader
from polygpt.data.mixing import PERIOD, Mixture, whole_shares
from polygpt.errors import RequestError

WEIGHTS = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any)


@settings(deadline=None, max_examples=40)
@given(weights=WEIGHTS)
def test_every_prefix_holds_each_share_to_within_one_window(weights):
    mixture, counts = Mixture(weights), [0] * len(weights)
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
            Mixture(weights, limits)
        return
    mixture, counts = Mixture(weights, limits), [0] * len(weights)
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


def test_the_billionth_batch_is_found_in_under_a_second():
    begun = time.perf_counter()
    mixture = Mixture([0.123456, 0.5, 0.376544, 0.0001])
    source, index = mixture.locate(10**9 * 512)
    assert time.perf_counter() - begun < 1
    assert mixture.counts(10**9 * 512 + 1)[source] == index + 1


@pytest.mark.parametrize("weights", [[0], [0, 0.0]])
def test_weights_that_sum_to_nothing_are_refused(weights):
    with pytest.raises(RequestError, match="the weights sum to 0"):
        Mixture(weights)


@pytest.fixture
def mixed(prepared):
    """`mixed(weights, epochs)`: a loader of three sources, and a source of each window that it reads."""
    shards = {
        name: prepared([f"{name} {i} " * 9 for i in range(count)], name=name, validation_fraction=0.3)
        for name, count in (("a", 20), ("b", 60), ("c", 40))
    }

    def make(weights, epochs=None, seed=3, **options):
        options = {"context_length": 16, "batch_size": 5, "seed": seed, **options}
        return MixedLoader({name: Loader(s.train, **options) for name, s in shards.items()}, weights, epochs)

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
