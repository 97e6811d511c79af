"""A text with too many tokens is refused by its length, before it is encoded, and no other is."""

from unittest.mock import patch

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers

from polygpt.errors import RequestError, TooLong
from polygpt.tokenizers import Tokenizer, TokenizerConfig, train_tokenizer
from polygpt.tokenizers import encoding as module
from polygpt.tokenizers import tokenizer as tokenizer_module

SAMPLE = "the cat sat on the mat, the rat ate the oat; another brought together Größe 東京 🙂\n" * 20
BYTE = train_tokenizer(TokenizerConfig(kind="byte"), [])
BPE = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), [SAMPLE])
CHAR = train_tokenizer(TokenizerConfig(kind="char"), [SAMPLE])
SPACES = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), ["the    cat,    \n\n\n\n sat" * 20])


def sentencepiece(*steps):
    """A BPE that writes spaces as `▁` and unknown characters as bytes, as Llama's does."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"the", "he", "the", "▁the"]
    merges = [("h", "e"), ("t", "he"), ("▁", "the")]
    made = hf.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), *steps])
    made.add_special_tokens(["<a special token that is very long>"])
    return Tokenizer(made)


@pytest.mark.parametrize(
    "tokenizer", [BYTE, BPE, SPACES, CHAR, sentencepiece()], ids=["byte", "bpe", "spaces", "char", "llama"]
)
@settings(deadline=None, max_examples=40)
@given(text=st.text(sorted(set(SAMPLE))) | st.lists(st.sampled_from(["the ", " the", "    ", "Größe"])).map("".join))
def test_a_text_is_never_refused_for_its_length_that_has_no_more_tokens(tokenizer, text):
    with patch.object(tokenizer_module, "CHECKED", 0):
        tokenizer.check_length(text, len(tokenizer.encode(text)))
        tokenizer.check_length(text, len(tokenizer.encode(text, special=True)), special=True)


@pytest.mark.parametrize(
    ("tokenizer", "longest"),
    [(BYTE, 1), (CHAR, 1), (BPE, 9), (sentencepiece(), 6)],
    ids=["byte", "char", "bpe", "llama"],
)
def test_a_text_of_too_many_tokens_is_refused_by_its_length(tokenizer, longest, monkeypatch):
    """`longest`: of the tokens, in bytes or characters; `<0x00>` has 6."""
    monkeypatch.setattr(module.Encoder, "encode_batch", None)
    text = "the cat " * 10_000
    with pytest.raises(TooLong, match=f"at least {-(-80_000 // longest)} tokens, model.context_length is 8000:"):
        tokenizer.check_length(text, 8000)
    with pytest.raises(RequestError, match="lone surrogate"):
        tokenizer.check_length(text + "\ud800", 8000)
    tokenizer.check_length("the cat " * 8000, 10)  # soon counted


def test_a_tokenizer_that_may_drop_text_refuses_none_for_its_length():
    stripping = hf.Tokenizer.from_str(BYTE.to_json())
    stripping.add_tokens([hf.AddedToken("cat", rstrip=True)])
    for tokenizer in (sentencepiece(normalizers.Replace(hf.Regex(" +"), "")), Tokenizer(stripping)):
        tokenizer.check_length("cat" + " " * 100_000, 4)
