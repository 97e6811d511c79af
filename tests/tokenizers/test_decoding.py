"""Decoding tokens that are not bytes of their own: byte fallback, spaces, continuations."""

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from polygpt.tokenizers import Tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(prefix: bool = True) -> hf.Tokenizer:
    """`<s>`, every byte, the space, and two words."""
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", *BYTES, "▁", "a", "b", "▁a", "▁b"])}
    made = hf.Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True))
    before = [normalizers.Prepend("▁")] if prefix else []
    made.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>"])
    return made


SP = Tokenizer(sentencepiece())
PLAIN = Tokenizer(sentencepiece(prefix=False))


def byte_ids(data: bytes) -> list[int]:
    return [2 + byte for byte in data]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("你".encode() + b"\xe5\xa5", "你\ufffd"),  # cut
        ("你".encode() + b"\xff" + "好".encode(), "你\ufffd好"),  # a bad byte between
        (b"\x80" + "é🙂".encode(), "\ufffdé🙂"),  # begins in the middle of a character
        (b"\xed\xa0\x80A", "\ufffd\ufffd\ufffdA"),  # half of a surrogate pair
        ("▁\ufffd".encode(), "▁\ufffd"),  # what the decoder itself writes with
        (b"", ""),
    ],
)
def test_whole_characters_survive_a_bad_or_unfinished_byte(data, text):
    assert SP.decode(byte_ids(data)) == text
    a = SP.encode("a")
    assert SP.decode([*a, *byte_ids(data), *a]) == f"a{text} a"
    assert PLAIN.decode_after(a, byte_ids(data)) == text


@settings(deadline=None, max_examples=100)
@given(data=st.binary(max_size=12))
def test_a_run_of_bytes_decodes_as_utf8_does(data):
    assert PLAIN.decode(byte_ids(data)) == data.decode(errors="replace")


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.sampled_from("ab é你🙂"), max_size=12), cut=st.integers(0, 12))
def test_text_comes_back_whole_and_as_a_continuation(text, cut):
    for tokenizer in (SP, PLAIN):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        whole = tokenizer.encode(text[:cut] + text[cut:])
        for at in range(len(whole) + 1):
            before, after = whole[:at], whole[at:]
            joined = tokenizer.decode(before) + tokenizer.decode_after(before, after)
            # A character cut in two is not put together again: each side shows its own bytes.
            assert joined == text or "\ufffd" in joined


def test_a_continuation_is_the_text_of_its_own_ids():
    prompt = [*SP.encode("a"), *byte_ids("日本".encode())]
    assert SP.decode_after(prompt, byte_ids("語".encode())) == "語"
    assert SP.decode_after(prompt, SP.encode("b")) == " b"
    assert SP.decode_after(byte_ids("日".encode())[:-1], byte_ids("語".encode())) == "語"
    # New ids do not finish a character that the prompt left unfinished.
    assert SP.decode_after(byte_ids(b"\xe8"), byte_ids(b"\xaa")) == "\ufffd"
    # As the first word of a text it has no space before it.
    assert SP.decode_after([], SP.encode("b")) == SP.decode_after(SP.start, SP.encode("b")) == "b"


def test_a_stream_only_ever_grows():
    ids = [*SP.encode("a 你b"), *byte_ids(b"\xf0\x9f\x99"), *SP.encode("é a")]
    shown = ""
    for end in range(len(ids) + 1):
        text = SP.decode_after(SP.encode("a"), ids[:end]).rstrip("\ufffd")
        assert text.startswith(shown)
        shown = text
    assert shown == " a 你b\ufffd é a"


def test_words_of_other_kinds_of_tokenizers_keep_the_space_between():
    words = {"a": 0, "b": 1, "##b": 2, "[UNK]": 3}
    pieces = hf.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    suffixes = hf.Tokenizer(models.BPE({"a</w>": 0, "b</w>": 1, "b": 2}, [], end_of_word_suffix="</w>"))
    suffixes.pre_tokenizer, suffixes.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder("</w>")
    for made in (pieces, suffixes):
        assert Tokenizer(made).decode_after([0], [1, 0]) == " b a"
        assert Tokenizer(made).decode([0, 1, 0]) == "a b a"
    assert Tokenizer(pieces).decode_after([0], [2]) == "b"


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_spaces_within_the_first_token_are_kept(scheme):
    pieces = ["▁", "a", "b", "▁a", "▁b", "▁a▁b", "▁▁", "▁▁a▁b", "b▁a", "b▁"]
    merges = [("▁", "a"), ("▁", "b"), ("▁a", "▁b")]
    made = hf.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer = Tokenizer(made)
    first = "" if scheme != "never" else " "
    assert tokenizer.decode([5, 3]) == f"{first}a b a"
    assert tokenizer.decode([7]) == f"{first} a b"
    assert tokenizer.decode([8, 5]) == "b a a b"
    assert tokenizer.decode_after([5], [5]) == " a b"


@pytest.mark.parametrize(
    ("post_processor", "start"),
    [
        (processors.TemplateProcessing("<s> $A", None, [("<s>", 1)]), (1,)),
        (processors.TemplateProcessing("<s> <unk> $A <s>", None, [("<s>", 1), ("<unk>", 0)]), (1, 0)),
        (processors.TemplateProcessing("$A <s>", None, [("<s>", 1)]), ()),
        (processors.BertProcessing(("<unk>", 0), ("<s>", 1)), (1,)),
        (processors.Sequence([processors.ByteLevel(), processors.RobertaProcessing(("<unk>", 0), ("<s>", 1))]), (1,)),
        (processors.ByteLevel(), ()),
        (None, ()),
    ],
)
@pytest.mark.parametrize(
    "drops",
    [{}, {"normalizer": normalizers.Strip()}, {"pre_tokenizer": pre_tokenizers.Whitespace()}],
    ids=["nothing", "strip", "whitespace"],
)
def test_the_start_token_is_found_whatever_becomes_of_blanks(post_processor, start, drops):
    made = sentencepiece()
    for part, value in drops.items():
        setattr(made, part, value)
    made.post_processor = post_processor
    assert Tokenizer(made).start == start
