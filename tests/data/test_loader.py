"""The loader: windows cover exactly what they should, batch i is a function of (seed, i), epochs differ."""

import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygpt.data import Loader
from polygpt.errors import RequestError


def split_of(tokens):
    """A split whose token at position p is p, so that a window says where it is from."""
    ids = np.arange(tokens, dtype=np.int32)
    return SimpleNamespace(name="train", tokens=tokens, fingerprint="f", read=lambda a, b: ids[a:b].copy())


def starts(loader, batches):
    return [int(row[0]) for i in batches for row in loader.batch(i)["input"]]


@settings(deadline=None, max_examples=200)
@given(tokens=st.integers(2, 200), length=st.integers(1, 40), batch=st.integers(1, 9), data=st.data())
def test_evaluation_counts_every_target_once_in_order(tokens, length, batch, data):
    stride = data.draw(st.integers(1, length) | st.none())
    loader = Loader(split_of(tokens), context_length=length, batch_size=batch, stride=stride, shuffle=False)
    batches = list(loader.epoch())
    assert len(batches) == loader.num_batches == -(-loader.num_windows // batch)
    seen = []
    for b in batches:
        assert b["input"].shape == b["target"].shape == b["mask"].shape == (batch, length)
        assert (b["input"].dtype, b["target"].dtype, b["mask"].dtype) == (np.int32, np.int32, np.float32)
        assert set(np.unique(b["mask"])) <= {0.0, 1.0}
        counts = b["mask"] == 1
        assert (b["target"][counts] == b["input"][counts] + 1).all()
        seen += b["target"][counts].tolist()
    assert seen == list(range(1, tokens))


@settings(deadline=None, max_examples=30)
@given(
    extra=st.integers(1, 150),
    length=st.integers(1, 20),
    stride=st.integers(1, 30),
    seed=st.integers(0, 2**70),
)
def test_a_training_epoch_has_each_full_window_once(extra, length, stride, seed):
    tokens = length + extra
    loader = Loader(split_of(tokens), context_length=length, batch_size=1, stride=stride, seed=seed)
    expected = list(range(0, tokens - length, stride))
    assert loader.num_windows == loader.num_batches == len(expected)
    for epoch in range(2):
        batches = range(epoch * len(expected), (epoch + 1) * len(expected))
        assert sorted(starts(loader, batches)) == expected
    one = loader.batch(3)
    assert one["mask"].all()
    assert (one["target"] == one["input"] + 1).all()
    assert one["target"][0, -1] < tokens


def test_batch_i_is_a_function_of_seed_and_i():
    def make(seed=1):
        return Loader(split_of(5000), context_length=8, batch_size=4, seed=seed)

    wanted = {i: make().batch(i) for i in (0, 7, 155, 156, 4000)}
    loader = make()
    for i in (4000, 7, 156, 0, 155, 7):
        assert all((loader.batch(i)[key] == wanted[i][key]).all() for key in wanted[i])
    assert starts(make(1), range(50)) != starts(make(2), range(50))


def test_each_epoch_is_shuffled_anew_and_neighbouring_seeds_share_none():
    def epochs(seed):
        loader = Loader(split_of(1001), context_length=10, batch_size=10, seed=seed)
        assert loader.num_batches == 10
        return [tuple(starts(loader, range(10 * e, 10 * e + 10))) for e in range(5)]

    orders = [order for seed in range(4) for order in epochs(seed)]
    assert len(set(orders)) == len(orders) == 20
    assert all(sorted(order) == list(range(0, 1000, 10)) for order in orders)
    assert tuple(range(0, 1000, 10)) not in orders


def test_a_batch_larger_than_an_epoch_goes_on_into_the_next():
    loader = Loader(split_of(31), context_length=10, batch_size=7)
    assert (loader.num_windows, loader.num_batches) == (3, 1)
    assert sorted(starts(loader, range(3))) == [0] * 7 + [10] * 7 + [20] * 7


def test_every_offset_of_a_million_is_reached_quickly():
    loader = Loader(split_of(1_000_000), context_length=32, batch_size=50, stride=1)
    assert loader.num_windows == 1_000_000 - 32
    begun = time.perf_counter()
    found = starts(loader, range(0, 40_000, 2000))
    assert (time.perf_counter() - begun) / 1000 < 1e-3
    assert len(set(found)) > 990
    assert 400_000 < np.mean(found) < 600_000


def test_a_split_shorter_than_a_window_is_refused_with_the_counts():
    expected = r"train has 40 tokens, one window needs 65 \(context_length 64 \+ 1\)"
    with pytest.raises(RequestError, match=expected):
        Loader(split_of(40), context_length=64, batch_size=2)
    Loader(split_of(40), context_length=64, batch_size=2, shuffle=False)
    with pytest.raises(RequestError, match="has 1 tokens, one window needs 2"):
        Loader(split_of(1), context_length=64, batch_size=2, shuffle=False)
    assert Loader(split_of(65), context_length=64, batch_size=2).num_windows == 1


@pytest.mark.parametrize(
    "settings_",
    [{"context_length": 0}, {"batch_size": 0}, {"stride": 0}, {"seed": -1}, {"stride": 9, "shuffle": False}],
)
def test_numbers_out_of_range_are_refused(settings_):
    with pytest.raises(RequestError, match=next(iter(settings_))):
        Loader(split_of(100), **{"context_length": 8, "batch_size": 2, **settings_})


def test_batches_that_are_not_there_are_an_index_error():
    loader = Loader(split_of(100), context_length=8, batch_size=2, shuffle=False)
    for i in (-1, loader.num_batches):
        with pytest.raises(IndexError):
            loader.batch(i)


def test_the_fingerprint_tells_apart_whatever_changes_a_batch(prepared):
    train = prepared([f"text number {i}" for i in range(40)], name="a").train
    other = prepared([f"text number {i}!" for i in range(40)], name="b").train
    same = {"context_length": 8, "batch_size": 2, "stride": 4, "seed": 0, "shuffle": True}
    changes = [{"context_length": 9}, {"batch_size": 3}, {"stride": 5}, {"seed": 1}, {"shuffle": False}]
    prints = [Loader(train, **{**same, **change}).fingerprint for change in [{}, *changes]]
    prints.append(Loader(other, **same).fingerprint)
    assert len(set(prints)) == 7
    assert Loader(train, **same).fingerprint == prints[0]


def test_neither_room_nor_evaluation_loads_jax():
    code = (
        "import sys, polygpt.data, polygpt.tokenizers\n"
        "from types import SimpleNamespace as S\n"
        "polygpt.data.Loader(S(tokens=9, name='x'), context_length=4, batch_size=2, shuffle=False)\n"
        "sys.exit('jax' in sys.modules or 'grain' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
