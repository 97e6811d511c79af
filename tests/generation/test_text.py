"""From ids to text: pieces join to the whole however the ids come, and nothing is shown that may still change."""

import itertools

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from polygpt.generation import TextStream
from polygpt.generation.text import REPLACEMENT
from polygpt.tokenizers import Tokenizer, TokenizerConfig, train_tokenizer

TEXT = "the cat sat on a mat, 漢字 and 😀 sat – ééé ##, # the end\n"


# Of a tokenizer such as Llama's: words marked by ▁, and a token for each byte.
PIECES = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁c", "at", "#", "##", "d##", "é"]


def fallback_tokenizer() -> Tokenizer:
    vocabulary = {piece: number for number, piece in enumerate(PIECES)}
    made = hf.Tokenizer(hf.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")])
    before = [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    made.decoder = hf.decoders.Sequence([*before, hf.decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(["<unk>", "<s>"])
    return Tokenizer(made)


def ids_of(*pieces: str) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


TOKENIZERS = {
    "byte": train_tokenizer(TokenizerConfig(kind="byte"), []),
    "char": train_tokenizer(TokenizerConfig(kind="char"), [TEXT]),
    "bpe": train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=280), [TEXT * 4]),
    "fallback": fallback_tokenizer(),
}
ALL = pytest.mark.parametrize("name", TOKENIZERS)
# Ids of which stop strings are often made.
COMMON = {name: TOKENIZERS[name].encode(TEXT) for name in ("byte", "char", "bpe")}
COMMON["fallback"] = ids_of("▁", "▁the", "▁c", "at", "#", "##", "d##", "é", "<0xC3>", "<0xA9>", "<0xE6>")


def encoded(text):
    return TOKENIZERS["byte"].encode(text)


def stream_of(name, prompt=(), stop=()):
    return TextStream(TOKENIZERS[name].decode_after, prompt, stop)


def feed_all(stream, ids, cuts=()):
    """The pieces that come of `ids`, divided at `cuts`."""
    places = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    pieces = [stream.feed(ids[start:end]) for start, end in itertools.pairwise(places)]
    return [*pieces, stream.close()]


cuts = st.lists(st.integers(0, 40), max_size=8)


@ALL
@given(st.data())
@settings(max_examples=80, deadline=None)
def test_pieces_join_to_the_decoded_whole_for_every_division(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=24))  # one beyond the last is unknown
    prompt = data.draw(st.lists(st.integers(3, tokenizer.vocab_size - 1), min_size=1, max_size=3))
    stream = stream_of(name, prompt)
    pieces = feed_all(stream, ids, data.draw(cuts))
    assert "".join(pieces) == stream.text == tokenizer.decode_after(prompt, ids)
    assert stream.tokens == ids


@ALL
@given(st.data())
@settings(max_examples=80, deadline=None)
def test_nothing_of_a_stop_string_is_ever_shown(name, data):
    ids = data.draw(st.lists(st.sampled_from(COMMON[name]), min_size=1, max_size=24))
    text = "".join(feed_all(stream_of(name), ids))
    start = data.draw(st.integers(0, len(text)))
    words = [text[start : start + 3] or "zz", data.draw(st.sampled_from(["##", "# ", "the", "t#"]))]
    stream, at_once = stream_of(name, stop=words), stream_of(name, stop=words)
    pieces = feed_all(stream, ids, data.draw(cuts))
    feed_all(at_once, ids)
    assert (at_once.text, at_once.tokens, at_once.stopped) == (stream.text, stream.tokens, stream.stopped)
    assert "".join(pieces) == stream.text
    assert text.startswith(stream.text)
    assert not any(word in stream.text for word in words)
    assert stream.stopped == any(word in text for word in words)
    # The tokens are the fewest whose text holds all of it.
    assert stream_of(name).feed(stream.tokens).startswith(stream.text.rstrip(REPLACEMENT))
    if stream.stopped and stream.tokens:
        assert len(stream_of(name).feed(stream.tokens[:-1])) < len(stream.text)


def test_text_is_held_back_only_while_it_may_become_a_stop():
    stream = stream_of("byte", stop=["##!", "END"])
    ids = encoded("a#b##c EN end##!x")
    pieces = [stream.feed([token]) for token in ids]
    assert pieces == ["a", "", "#b", "", "", "##c", " ", "", "", "EN ", "e", "n", "d", "", "", "", ""]
    assert (stream.text, stream.stopped, stream.close()) == ("a#b##c EN end", True, "")
    assert stream.tokens == ids[:13]


def test_what_was_held_back_comes_at_the_end():
    stream = stream_of("byte", stop=["##"])
    assert stream.feed(encoded("ab#")) == "ab"
    assert stream.close() == "#"


def test_a_stop_that_ends_first_wins():
    stream = stream_of("byte", stop=["abc", "b"])
    stream.feed(encoded("xabc"))
    assert stream.text == "xa"


def test_a_token_that_the_text_and_the_stop_share_belongs_to_the_text():
    stream = stream_of("fallback", stop=["##"])
    feed_all(stream, ids_of("▁the", "d##", "at"))
    assert (stream.text, stream.tokens) == ("thed", ids_of("▁the", "d##"))
    stream = stream_of("fallback", stop=["##"])
    feed_all(stream, ids_of("▁the", "#", "##", "at"))
    assert (stream.text, stream.tokens) == ("the", ids_of("▁the"))


def test_an_unfinished_character_is_held_back():
    stream = stream_of("byte")
    ids = encoded("é漢😀!")
    assert [stream.feed([token]) for token in ids] == ["", "é", "", "", "漢", "", "", "", "😀", "!"]


def test_bytes_that_are_no_character_do_not_hold_back_what_follows():
    stream = stream_of("byte")
    pieces = [stream.feed([byte]) for byte in b"a\xff\xff\xffb\xe5\xa5c\xf0"]
    assert "".join(pieces[:5]) == "a\ufffd\ufffd\ufffdb"
    assert len("".join(pieces[:4])) == 3  # only the last bad byte may still begin a character
    assert ("".join(pieces), stream.close()) == ("a\ufffd\ufffd\ufffdb\ufffdc", "\ufffd")


def test_the_space_before_the_first_word_stays_where_text_comes_before():
    cat = ids_of("▁c", "at")
    assert feed_all(stream_of("fallback", ids_of("▁the")), cat) == [" cat", ""]
    assert feed_all(stream_of("fallback"), cat) == ["cat", ""]
