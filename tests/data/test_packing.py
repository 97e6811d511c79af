"""Packing: every token is in one window, windows are filled well, and a document is the same alone and packed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from polygpt.config import validate
from polygpt.data import DataConfig, Loader, packing
from polygpt.data.packing import pack
from polygpt.errors import RequestError
from polygpt.model import Model
from polygpt.model.attention import REGISTRY
from polygpt.tokenizers import TokenizerConfig, train_tokenizer

TEXTS = [f"document {i} " + "abc " * (i % 9) for i in range(60)]


def offsets_of(sizes):
    return np.cumsum([0, *sizes])


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=60), capacity=st.integers(1, 24))
def test_every_token_is_in_exactly_one_window(sizes, capacity):
    found = pack(offsets_of(sizes), capacity)
    covered = np.zeros(sum(sizes), int)
    for start, length in zip(found.starts, found.lengths, strict=True):
        covered[start : start + length] += 1
    assert (covered == 1).all()
    filled = np.add.reduceat(found.lengths, found.first[:-1])
    assert filled.max() <= capacity
    assert filled.min() >= 1
    assert len(filled) == found.num_windows
    assert found.padding == pytest.approx(1 - sum(sizes) / (len(filled) * capacity))
    # A document that fits is whole; another is in as few pieces as can be.
    assert len(found.starts) == sum(-(-size // capacity) for size in sizes)
    assert sorted(found.starts[found.ends] + found.lengths[found.ends]) == offsets_of(sizes)[1:].tolist()
    # No two windows of a block would fit into one: what best fit guarantees.
    halves = np.sort(filled)[:2]
    assert len(halves) < 2 or halves.sum() > capacity


def test_windows_are_nearly_full():
    random = np.random.default_rng(0)
    sizes = np.minimum(random.lognormal(5, 1, 20_000).astype(int) + 1, 3000)
    assert pack(offsets_of(sizes), 1024).padding < 0.01


def test_packing_looks_ahead_so_far_and_no_further(monkeypatch):
    monkeypatch.setattr(packing, "LOOKAHEAD", 4)
    found = pack(offsets_of([6, 6, 6, 6, 4, 4, 4, 4]), 10)
    assert found.num_windows == 6
    assert found.padding == pytest.approx(1 - 40 / 60)


def loader(prepared, length=40, **changes):
    shards = prepared(TEXTS, split="fraction", validation_fraction=0.3, **changes)
    options = {"context_length": length, "batch_size": 4, "packing": "documents"}
    return shards, Loader(shards.train, seed=1, **options), Loader(shards.validation, shuffle=False, **options)


def counted(loader):
    """How often each (input, target) pair counts in an epoch."""
    pairs = {}
    for i in range(-(-loader.num_windows // loader.batch_size)):
        batch = loader.batch(i)
        for pair in zip(*(batch[name][batch["mask"] == 1].tolist() for name in ("input", "target")), strict=True):
            pairs[pair] = pairs.get(pair, 0) + 1
    return pairs


def test_held_out_targets_are_those_of_windows_of_text(prepared):
    shards, _, documents = loader(prepared)
    windows = Loader(shards.validation, context_length=40, batch_size=4, shuffle=False)
    assert counted(documents) == counted(windows)
    assert sum(counted(documents).values()) == shards.validation.tokens - 1


def test_rows_hold_documents_and_end_with_their_end(prepared):
    shards, train, _ = loader(prepared)
    end, seen = shards.manifest.end_of_text, []
    for i in range(train.num_windows):
        row = {name: values[0] for name, values in Loader.batch(_single(train), i).items()}
        assert row["segment_ids"].dtype == np.int32
        for segment in np.unique(row["segment_ids"]):
            at = np.flatnonzero(row["segment_ids"] == segment)
            assert (np.diff(at) == 1).all()
            counts = row["mask"][at] == 1
            if not counts.any():
                assert not row["input"][at].any() or len(at) == 1  # padding
                continue
            ids, targets = row["input"][at], row["target"][at]
            assert (ids[1:] == targets[:-1]).all()
            seen.append(ids[ids != end].tobytes())
            assert (ids[0] == end) or shards.train.documents < len(TEXTS)
    assert len(seen) >= shards.train.documents


def _single(train):
    return Loader(train.split, context_length=40, batch_size=1, seed=train.seed, packing="documents")


def test_batch_i_is_a_function_of_seed_and_i(prepared):
    shards, train, _ = loader(prepared)
    again = Loader(shards.train, context_length=40, batch_size=4, seed=1, packing="documents")
    for i in (1000, 3, 0):
        assert all((train.batch(i)[name] == again.batch(i)[name]).all() for name in train.batch(i))
    windows = Loader(shards.train, context_length=40, batch_size=4, seed=1)
    assert "segment_ids" not in windows.batch(0)
    assert windows.fingerprint != train.fingerprint == again.fingerprint
    assert train.facts(10)["packing"].startswith("documents, ")
    assert windows.facts(10) == {}


def test_without_an_end_of_text_the_last_token_of_a_document_has_no_target(prepared):
    tokenizer = train_tokenizer(TokenizerConfig(kind="char"), TEXTS)
    shards, _, documents = loader(prepared, tokenizer=tokenizer)
    assert shards.manifest.end_of_text is None
    assert sum(counted(documents).values()) == shards.validation.tokens - shards.validation.documents


@pytest.mark.parametrize("kind", sorted(REGISTRY))
def test_a_document_is_the_same_alone_and_in_a_loaders_window(prepared, kind):
    shards, train, _ = loader(prepared, length=100)
    case = {"attention": zoo.ATTENTIONS[kind], "context_length": 100, "vocab_size": shards.manifest.vocab_size}
    model = Model(zoo.config_of(zoo.Case(case)))
    params = zoo.lively(model)

    @jax.jit
    def logits(tokens, segment_ids):
        return model.module(params).logits(model.hidden(params, tokens, segment_ids=segment_ids).hidden)

    batch = train.batch(0)
    packed = logits(jnp.asarray(batch["input"]), jnp.asarray(batch["segment_ids"]))
    assert (batch["segment_ids"].max(1) >= 2).all()
    for row in range(2):
        for segment in np.unique(batch["segment_ids"][row]):
            at = np.flatnonzero(batch["segment_ids"][row] == segment)
            alone, own = np.zeros((4, 100), np.int32), np.ones((4, 100), np.int32)
            alone[0, : len(at)], own[0, : len(at)] = batch["input"][row, at], 0
            found = logits(jnp.asarray(alone), jnp.asarray(own))[0, : len(at)]
            np.testing.assert_allclose(found, packed[row, at], rtol=1e-5, atol=1e-5)


def test_a_stride_between_documents_is_refused():
    with pytest.raises(RequestError, match="leave it out with packing: documents"):
        validate(DataConfig, {"packing": "documents", "stride": 4})
