"""Perplexity against a computation of its own, and that every token is scored exactly once."""

import json
import math

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.special import log_softmax

from polygpt.errors import RequestError
from polygpt.evaluation import PerplexityConfig, encode_text, perplexity, read_text
from polygpt.evaluation.perplexity import windows
from polygpt.loading import build, load
from polygpt.presets import preset
from polygpt.tokenizers import Tokenizer, TokenizerConfig, train_tokenizer

TEXT = "to see what was there, o yes! ROMEO: speak again, the cat sat on a mat"


@pytest.fixture(scope="module")
def lm(tiny_run):
    return load(tiny_run)


def naive(lm, ids, context, stride):
    """nats of every token but the first, from `lm.logits` of each window alone."""
    nats = {}
    for begin in range(0, len(ids), stride):
        inputs = ids[begin : begin + context]
        padded = np.pad(inputs, (0, lm.config.context_length - len(inputs)))  # of one shape, for one program
        log_p = log_softmax(np.asarray(lm.logits(padded[None])[0], np.float64), axis=-1)
        for step in range(len(inputs)):
            place = begin + step + 1
            if place < len(ids) and place not in nats:
                nats[place] = -log_p[step, ids[place]]
    return nats


@pytest.mark.parametrize(("context", "stride"), [(16, 8), (16, 16), (16, 1), (5, 3), (1, 1), (None, None)])
def test_it_is_what_windows_one_by_one_give(lm, context, stride):
    text = encode_text(TEXT, lm.tokenizer, "text")
    result = perplexity(lm, text, context, stride)
    expected = naive(lm, text.ids, context or 16, stride or 8)
    nats = math.fsum(expected.values())
    assert (result.tokens, result.bytes) == (len(expected), len(TEXT.encode()))
    assert result.nats_per_token == pytest.approx(nats / len(expected), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / len(expected)), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)
    assert (result.context, result.stride) == (context or 16, stride or 8)


@given(st.integers(2, 60), st.integers(1, 20), st.integers(1, 20))
@example(17, 16, 16)
@example(2, 1, 1)
def test_every_token_is_scored_once_from_what_stands_before_it(count, context, stride):
    stride = min(stride, context)
    ids = np.arange(count)
    scored = []
    for number, row in enumerate(windows(ids, context, stride)):
        assert 1 <= len(row.inputs) <= context
        assert list(row.targets) == list(range(row.inputs[-1] - len(row.targets) + 2, row.inputs[-1] + 2))
        assert number == 0 or len(row.targets) <= stride
        assert number == 0 or len(row.inputs) - len(row.targets) >= min(context - stride, 1)
        scored += list(row.targets)
    assert scored == list(range(1, count))


@given(st.integers(2, 60), st.integers(1, 20))
def test_a_stride_of_the_context_gives_disjoint_windows(count, context):
    rows = list(windows(np.arange(count), context, context))
    assert [list(row.inputs) for row in rows] == [
        list(range(begin, min(begin + context, count - 1))) for begin in range(0, count - 1, context)
    ]
    assert all(len(row.inputs) == len(row.targets) for row in rows)


@pytest.fixture(scope="module")
def byte_lm():
    """A model that knows nothing: every byte, and the end of text, is as likely."""
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), [TEXT])
    config = preset(
        "gpt2", num_layers=1, embed_dim=8, context_length=32, **{"attention.num_heads": 1, "init_std": 1e-9}
    )
    return build(config.replace(vocab_size=tokenizer.vocab_size), tokenizer=tokenizer)


def test_what_stands_before_the_text_is_said(byte_lm):
    end = byte_lm.tokenizer.end_of_text
    text, bare = (encode_text(TEXT, byte_lm.tokenizer, "text", start) for start in (True, False))
    assert (text.start_token, text.ids[0], bare.start_token) == (end, end, None)
    assert len(text.ids) == len(bare.ids) + 1
    assert perplexity(byte_lm, bare).tokens == len(TEXT) - 1
    assert perplexity(byte_lm, text).tokens == len(TEXT)


def test_a_tokenizer_without_an_end_of_text_leaves_the_first_token_out(lm):
    text = encode_text(TEXT, lm.tokenizer, "text")
    assert (lm.tokenizer.end_of_text, text.start_token, len(text.ids)) == (None, None, len(TEXT))


def test_an_end_of_text_written_in_the_file_is_ordinary_text(byte_lm):
    written = encode_text("a<|endoftext|>b", byte_lm.tokenizer, "text", start=False)
    assert byte_lm.tokenizer.end_of_text not in written.ids
    assert len(written.ids) == len("a<|endoftext|>b")


def test_bytes_that_the_tokenizer_drops_do_not_lower_bits_per_byte(byte_lm):
    made = hf.Tokenizer(hf.models.WordLevel({"[UNK]": 0, "cat": 1, "sat": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    words = Tokenizer(made)
    lm = build(byte_lm.config, tokenizer=words)
    kept, lossy = (perplexity(lm, encode_text(text, words, "text")) for text in ("cat sat", "cat   zebra   sat"))
    assert (kept.bytes, kept.lost_bytes, lossy.bytes, lossy.lost_bytes) == (6, 1, 6, 11)
    assert lossy.bits_per_byte == pytest.approx(2 * kept.bits_per_byte, rel=1e-3)  # two tokens scored instead of one
    assert perplexity(lm, encode_text("zebra zebra", words, "text")).bytes == 1


def test_a_model_that_knows_nothing_takes_the_log_of_its_vocabulary(byte_lm):
    result = perplexity(byte_lm, encode_text("äö" * 30, byte_lm.tokenizer, "text"))
    assert result.perplexity == pytest.approx(byte_lm.config.vocab_size, rel=1e-4)
    assert result.bits_per_byte == pytest.approx(math.log2(byte_lm.config.vocab_size), rel=1e-4)
    assert result.bytes == 120


@pytest.mark.parametrize(
    ("data", "complaint"),
    [(None, "no such file"), (b"", "is empty"), (b"ab\xff", r"not UTF-8 text \(byte 2\)")],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, data, complaint):
    path = tmp_path / "text.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(RequestError, match=complaint):
        read_text(path)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"stride": 17}, r"stride=17 must lie in 1..16"),
        ({"context": 17}, r"context=17 must lie in 1..16, the model's context_length"),
        ({"context": 4, "stride": 5}, r"stride=5 must lie in 1..4"),
    ],
)
def test_windows_that_do_not_fit_are_refused(lm, tmp_path, settings, complaint):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    with pytest.raises(RequestError, match=complaint):
        PerplexityConfig(path=str(path), **settings).prepare(lm.tokenizer, 16)


def test_one_token_alone_cannot_be_predicted(lm, byte_lm):
    with pytest.raises(RequestError, match="one token and nothing comes before it"):
        encode_text("a", lm.tokenizer, "text")
    assert len(encode_text("a", byte_lm.tokenizer, "text").ids) == 2


MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text, "id": 0}) + "\n\n" for text in texts), encoding="utf-8")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text(MARK + TEXT, encoding="utf-8")
    assert read_text(tmp_path / "a.txt") == read_text(tmp_path / "a.txt", documents=True) == [TEXT]
    (tmp_path / "a.jsonl").write_text(MARK + json.dumps({"text": TEXT}), encoding="utf-8")
    assert read_text(tmp_path / "a.jsonl") == [TEXT]
    (tmp_path / "b.txt").write_text(MARK, encoding="utf-8")
    with pytest.raises(RequestError, match="is empty"):
        read_text(tmp_path / "b.txt")


def test_documents_are_read_as_training_reads_them(tmp_path, byte_lm):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo<|endoftext|>")
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    write_jsonl(tmp_path / "b.jsonl", ["one", "two"], key="content")
    ways = [("a.txt", {"documents": True}), ("a.jsonl", {}), ("b.jsonl", {"text_key": "content"})]
    for name, how in ways:
        assert read_text(tmp_path / name, **how) == ["one", "two"]
    assert read_text(tmp_path / "a.txt") == ["one\n<|endoftext|>\ntwo<|endoftext|>"]

    end = byte_lm.tokenizer.end_of_text
    text = encode_text(["one", "two"], byte_lm.tokenizer, "text")
    assert text.ids.tolist() == [end, *b"one", end, *b"two"]
    result = perplexity(byte_lm, text)
    assert (result.documents, result.tokens, result.bytes, result.start_token) == (2, 7, 6, end)
    bare = encode_text(["one", "two"], byte_lm.tokenizer, "text", start=False)
    assert (bare.ids.tolist(), bare.start_token) == (list(b"onetwo"), None)


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("a.jsonl", b'{"text": 5}', "line 1: 'text' must be text"),
        ("a.jsonl", b'{"body": "a"}', r"line 1: no key 'text'; its keys are: body \(choose one with --text-key\)"),
        ("a.jsonl", b"{", "line 1: not JSON"),
        ("a.jsonl", b"\n", "no text in it"),
        ("a.jsonl", b'{"text": "\xff"}', "not UTF-8"),
    ],
)
def test_malformed_documents_are_named(tmp_path, name, data, complaint):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RequestError, match=complaint) as caught:
        read_text(tmp_path / name)
    assert "data." not in str(caught.value)


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(RequestError, match="is a folder"):
        read_text(tmp_path)
