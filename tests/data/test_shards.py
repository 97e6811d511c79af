"""Preparation and shards: what goes in comes out, on the right side, and a changed file is refused."""

import hashlib
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polygpt.config import validate
from polygpt.data import DataConfig, TokenSplit, is_prepared, open_shards, open_source, prepare
from polygpt.data.shards import SplitEntry
from polygpt.errors import PolygptError, RequestError
from polygpt.tokenizers import Tokenizer, TokenizerConfig, train_tokenizer

CASES = itertools.count()
TEXTS = [f"document number {i} é" for i in range(60)]
FRESH = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def decoded(split, tokenizer):
    """The texts of a split's documents, the end of text before each taken off."""
    found = []
    for i in range(split.documents):
        ids = split.document(i)
        assert ids.dtype == np.int32
        if tokenizer.end_of_text is not None:
            assert ids[0] == tokenizer.end_of_text
            ids = ids[1:]
        found.append(tokenizer.decode(ids))
    return found


@FRESH
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=12),
    shard_tokens=st.integers(1, 60),
)
def test_any_documents_come_back_from_shards_of_any_size(prepared, byte_tokenizer, texts, shard_tokens):
    # A text known to fall on each side, so that neither is empty.
    texts = [*texts, "document number 0 é", "document number 5 é"]
    shards = prepared(texts, name=f"case{next(CASES)}", shard_tokens=shard_tokens, validation_fraction=0.5)
    train, validation = decoded(shards.train, byte_tokenizer), decoded(shards.validation, byte_tokenizer)
    assert sorted(train + validation) == sorted(texts)
    assert not set(train) & set(validation)
    assert [text for text in texts if text in set(train)] == train  # in the order of the source
    for split, side in ((shards.train, train), (shards.validation, validation)):
        assert split.bytes == sum(len(text.encode()) for text in side)
        assert split.tokens == len(split) == split.bytes + len(side)
        whole = split.read(0, split.tokens)
        assert whole.tolist() == np.concatenate([split.document(i) for i in range(len(side))]).tolist()
        for start in range(0, split.tokens, 7):
            stop = min(start + 25, split.tokens)
            assert split.read(start, stop).tolist() == whole[start:stop].tolist()


def test_the_sides_do_not_depend_on_order(prepared, byte_tokenizer):
    one = prepared(TEXTS, name="one", validation_fraction=0.3)
    other = prepared(TEXTS[::-1], name="other", validation_fraction=0.3)
    assert set(decoded(one.validation, byte_tokenizer)) == set(decoded(other.validation, byte_tokenizer))
    assert 8 <= one.validation.documents <= 30
    assert one.train.fingerprint != other.train.fingerprint


def test_a_fraction_cuts_the_text_in_order(prepared, byte_tokenizer):
    texts = ["abcdefgh", "ijklm", "nopqrst"]  # 20 characters
    shards = prepared(texts, split="fraction", validation_fraction=0.5)
    assert decoded(shards.train, byte_tokenizer) == ["abcdefgh", "ij"]
    assert decoded(shards.validation, byte_tokenizer) == ["klm", "nopqrst"]
    shards = prepared(texts, name="even", split="fraction", validation_fraction=0.6)
    assert decoded(shards.train, byte_tokenizer) == ["abcdefgh"]


def test_tiny_shakespeare_divides_as_nanogpt_does(shared_data, tmp_path):
    config = DataConfig(
        path=str(shared_data / "tinyshakespeare" / "input.txt"), split="fraction", validation_fraction=0.1
    )
    source = open_source(config)
    tokenizer = train_tokenizer(TokenizerConfig(kind="char"), (text for _, text in source))
    shards = prepare(source, tokenizer, tmp_path / "out", config)
    assert (shards.train.tokens, shards.validation.tokens) == (1_003_854, 111_540)
    assert tokenizer.decode(shards.validation.read(0, 14)) == "?\n\nGREMIO:\nGoo"
    assert shards.manifest.vocab_size == 65


@pytest.mark.parametrize(("count", "split"), [(1, "fraction"), (99, "fraction"), (100, "document"), (101, "document")])
def test_few_documents_are_split_by_fraction_where_it_is_left_open(prepared, byte_tokenizer, count, split):
    texts = [f"the text of document {n}" for n in range(count)]
    found, wanted = (prepared(texts, name=name, split=name, validation_fraction=0.2) for name in ("auto", split))
    for side in ("train", "validation"):
        texts = [decoded(getattr(shards, side), byte_tokenizer) for shards in (found, wanted)]
        assert texts[0] == texts[1]


def test_a_side_without_text_is_refused_with_a_mend(prepared, tmp_path):
    with pytest.raises(RequestError, match=r"set data\.split to 'fraction'"):
        prepared(["only one"])
    with pytest.raises(RequestError, match="no text is on the train side"):
        prepared(["x"], split="fraction")
    assert [p.name for p in tmp_path.iterdir()] == ["shards.jsonl"]  # nothing half-made is left


def test_a_folder_that_exists_is_left_alone(prepared, tmp_path):
    (tmp_path / "shards").mkdir()
    with pytest.raises(RequestError, match="exists already"):
        prepared(TEXTS)
    assert list((tmp_path / "shards").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="files that are open are not removed there")
def test_an_interruption_leaves_nothing(tmp_path, byte_tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = DataConfig(path=str(path))

    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(open_source(config), byte_tokenizer, tmp_path / "out", config, progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, byte_tokenizer):
    (tmp_path / "file.txt").write_text("x" * 100)
    config = DataConfig(path=str(tmp_path / "file.txt"), split="fraction")
    with pytest.raises(PolygptError, match=r"file\.txt/out: cannot be written"):
        prepare(open_source(config), byte_tokenizer, tmp_path / "file.txt" / "out", config)


def test_progress_counts_documents_once(tmp_path, byte_tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for split in ("document", "fraction"):
        seen = []
        config = DataConfig(path=str(path), split=split, validation_fraction=0.3)
        few = config.model_copy(update={"batch_chars": 30})  # fewer than are allowed
        prepare(open_source(config), byte_tokenizer, tmp_path / split, few, progress=seen.append)
        assert seen == sorted(seen)
        assert seen[-1] == len(TEXTS)
        assert len(seen) > 10


def test_a_document_the_tokenizer_cannot_hold_is_named(prepared):
    tokenizer = train_tokenizer(TokenizerConfig(kind="char"), ["abc"])
    with pytest.raises(RequestError, match=r"shards\.jsonl:2: character 'd'.* at index 1 "):
        prepared(["abc", "adc", "cba"], tokenizer)


def test_bytes_that_no_token_stands_for_are_counted_apart(prepared):
    made = hf.Tokenizer(hf.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    shards = prepared(["a b  a é", "b a b a "] * 20, Tokenizer(made), split="fraction", validation_fraction=0.5)
    validation = shards.manifest.validation
    assert (validation.bytes, validation.lost_bytes) == (10 * 3 + 10 * 4, 10 * 6 + 10 * 4)
    assert shards.validation.bytes == validation.bytes


def test_a_large_vocabulary_takes_four_bytes(prepared):
    letters = "".join(chr(c) for c in range(0x4E00, 0x4E00 + 70_000) if not 0xD800 <= c < 0xE000)
    tokenizer = train_tokenizer(TokenizerConfig(kind="char"), [letters])
    assert tokenizer.vocab_size > 1 << 16
    shards = prepared([letters], tokenizer, split="fraction")
    assert shards.manifest.dtype == "uint32"
    ids = np.concatenate([s.read(0, s.tokens) for s in (shards.train, shards.validation)])
    assert ids.tolist() == list(range(len(letters)))


def test_opened_again_they_are_the_same(prepared, tmp_path, byte_tokenizer):
    made = prepared(TEXTS, shard_tokens=100, validation_fraction=0.3)
    again = open_shards(tmp_path / "shards", byte_tokenizer)
    assert again.manifest == made.manifest
    assert again.train.fingerprint == made.train.fingerprint
    assert len(again.manifest.train.shards) > 3
    assert decoded(again.train, byte_tokenizer) == decoded(made.train, byte_tokenizer)
    assert is_prepared(DataConfig(path=str(tmp_path / "shards")))
    assert not is_prepared(DataConfig())
    assert not is_prepared(DataConfig(path=str(tmp_path / "shards.jsonl")))


def test_files_are_flat_little_endian(prepared, tmp_path):
    shards = prepared(["ab", "c"] * 20, split="fraction", validation_fraction=0.5)
    raw = (tmp_path / "shards" / "train-00000.tokens").read_bytes()
    assert raw[:10] == bytes([0, 1, ord("a"), 0, ord("b"), 0, 0, 1, ord("c"), 0])
    offsets = np.frombuffer((tmp_path / "shards" / "train-00000.offsets").read_bytes(), "<i8")
    assert offsets[:3].tolist() == [0, 3, 5]
    assert shards.manifest.train.shards[0].tokens_file.sha256 == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("name", ["train-00000.tokens", "train-00001.offsets", "validation-00000.tokens"])
def test_a_changed_file_is_refused_by_name(prepared, tmp_path, name):
    prepared(TEXTS, shard_tokens=100, validation_fraction=0.3)
    path = tmp_path / "shards" / name
    data = path.read_bytes()
    flipped = bytes([data[0] ^ 1]) + data[1:]
    for content, message in [
        (data[:-1], "truncated or changed"),
        (data + b"\0", "changed"),
        (flipped, "changed"),
        (None, "missing"),
    ]:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(RequestError, match=message) as caught:
            open_shards(tmp_path / "shards")
        assert str(path) in str(caught.value)
        assert "data prepare" in str(caught.value)


def test_another_tokenizer_is_refused(prepared, tmp_path):
    prepared(TEXTS)
    with pytest.raises(RequestError, match="another tokenizer"):
        open_shards(tmp_path / "shards", train_tokenizer(TokenizerConfig(kind="char"), TEXTS))


def test_a_manifest_that_is_not_in_order_is_refused(prepared, tmp_path):
    prepared(TEXTS)
    path = tmp_path / "shards" / "manifest.json"
    good = path.read_text()

    def changed(**changes):
        data = json.loads(good)
        for key, value in changes.items():
            *parents, last = key.split("__")
            place = data
            for step in parents:
                place = place[int(step) if step.isdigit() else step]
            place[last] = value
        return json.dumps(data)

    for content, message in [
        ("", "not JSON"),
        ("[]", "format None"),
        (changed(format=99), "format 99"),
        (changed(dtype="float32"), "dtype"),
        (changed(vocab_size=float("nan")), "vocab_size"),
        (changed(extra=1), "extra"),
        (changed(train__tokens=5), "train.tokens is not the sum"),
        (changed(validation__documents=500), "validation.documents is not the sum"),
        (changed(train__shards__0__tokens_file__name="../a.tokens"), "is not the name of a file in the same folder"),
        (changed(train__shards__0__tokens_file__name="/etc/passwd"), "is not the name of a file in the same folder"),
        (changed(train__shards__0__offsets_file__name=".."), "is not the name of a file in the same folder"),
        (changed(train__shards=[]), "shards"),
    ]:
        path.write_text(content)
        with pytest.raises(RequestError, match=message):
            open_shards(tmp_path / "shards")


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(RequestError, match="no folder of prepared shards"):
            open_shards(path)


def test_reading_outside_is_an_index_error(prepared):
    split = prepared(TEXTS).train
    for start, stop in [(-1, 2), (3, 2), (0, split.tokens + 1)]:
        with pytest.raises(IndexError):
            split.read(start, stop)
    for i in (-1, split.documents):
        with pytest.raises(IndexError):
            split.document(i)
    assert split.read(split.tokens, split.tokens).tolist() == []


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="needs Linux's /proc")
def test_a_window_from_anywhere_reads_its_own_pages_alone(tmp_path):
    tokens, hashed = 1 << 27, {"sha256": "0" * 64}
    with (tmp_path / "train-00000.tokens").open("wb") as stream:
        stream.truncate(2 * tokens)
    (tmp_path / "train-00000.offsets").write_bytes(bytes(8))
    files = {kind: {"name": f"train-00000.{kind}", **hashed} for kind in ("tokens", "offsets")}
    shard = {"tokens_file": files["tokens"], "offsets_file": files["offsets"], "tokens": tokens, "documents": 1}
    entry = validate(SplitEntry, {"documents": 1, "tokens": tokens, "bytes": 1, "shards": [shard]})
    split = TokenSplit("train", entry, tmp_path, np.dtype("<u2"))
    for start in range(0, tokens - 1025, tokens // 100):
        assert not split.read(start, start + 1025).any()
    of_maps = Path("/proc/self/smaps").read_text().partition(str(tmp_path / "train-00000.tokens"))[2]
    resident = int(re.search(r"^Rss: +(\d+) kB", of_maps, re.MULTILINE)[1])
    assert resident < 100 * 20, "of 100 windows of 2 kB, in pages of 4 kB"
