"""The properties of a `tokenizer.json` that encoding and decoding depend on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers as hf

from polygpt.tokenizers.bytelevel import BYTE_TO_CHAR


@dataclass(frozen=True)
class Structure:
    """What is known of a tokenizer, whoever made it."""

    kind: str
    """`char`, `byte`, or the library's name of the model in lower case."""
    byte_level: bool
    """Every byte has a token, written in GPT-2's alphabet."""
    added: frozenset[str]
    """Tokens beside the model's vocabulary, special ones included; they are spelled as they are written."""
    cuts: str | None
    """Where a text may be cut without changing its ids: `anywhere`, `words`, or None if nowhere."""
    lossless: bool
    """Encoding keeps every character, or fails."""
    lost_at_start: tuple[str, ...]
    """Characters that the pre-tokenizer drops from the beginning of a text."""
    spells: str | None
    """What its tokens' spellings have as many of as the text: `bytes`, `characters`, or None if neither is sure."""

    @property
    def exact(self) -> bool:
        """Each token stands for fixed bytes, so that decoding is joining them."""
        return self.byte_level or self.kind == "char"

    def cut(self, text: str, size: int) -> Iterator[str]:
        """`text` in pieces of about `size` characters that encode to the ids of the whole."""
        if self.cuts is None or len(text) <= size:
            yield text
            return
        start = 0
        while start < len(text):
            end = self._cut_after(text, start + size)
            yield text[start:end]
            start = end

    def _cut_after(self, text: str, position: int) -> int:
        if self.cuts == "anywhere" or position >= len(text):
            return position
        match = _WORD_END.search(text, position)
        return match.start() if match else len(text)


# GPT-2's split never joins a letter or digit with a space after it: `foo  bar` is foo, one space, space+bar.
_WORD_END = re.compile(r"(?<=[^\W_])(?=[ \n])")

_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def describe_structure(tokenizer: hf.Tokenizer, vocab: Mapping[str, int]) -> Structure:
    """The `Structure` of a tokenizer of the library, and of its model's `vocab`."""
    # Each part by itself: a large vocabulary and its merges take long to write as JSON and to read again.
    pre, decoder = _spec(tokenizer.pre_tokenizer), _spec(tokenizer.decoder)
    added = tokenizer.get_added_tokens_decoder().values()
    kind = type(tokenizer.model).__name__.lower()
    byte_level = _byte_level(pre, decoder, vocab)
    # What a merge makes has two characters or more, and is in the vocabulary.
    if kind == "bpe" and tokenizer.normalizer is None and vocab and all(len(token) == 1 for token in vocab):
        if not pre:
            kind = "char"
        elif byte_level and all(vocab[char] == byte for byte, char in enumerate(BYTE_TO_CHAR)):
            kind = "byte"
    # An added token that is not special is found in any text, across a cut too.
    can_cut = tokenizer.normalizer is None and all(token.special for token in added)
    lossless = tokenizer.normalizer is None and (byte_level or kind == "char") and _keeps_all(pre)
    return Structure(
        kind=kind,
        byte_level=byte_level,
        added=frozenset(token.content for token in added),
        cuts=_cuts(pre, kind) if can_cut else None,
        lossless=lossless,
        lost_at_start=_lost_at_start(pre),
        spells=_spells(tokenizer, vocab, pre, byte_level, lossless),
    )


def _spells(
    tokenizer: hf.Tokenizer, vocab: Mapping[str, int], pre: Mapping[str, Any], byte_level: bool, lossless: bool
) -> str | None:
    if any(token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values()):
        return None  # such a token takes any number of blanks with it
    if lossless:
        return "bytes" if byte_level else "characters"
    # SentencePiece's BPE: spaces are written as another character, and unknown characters as bytes.
    fallback = getattr(tokenizer.model, "byte_fallback", False) and vocab.keys() >= _BYTE_TOKENS
    normal = _spec(tokenizer.normalizer)
    steps = normal.get("normalizers", [normal] if normal else [])
    kept = all(step["type"] == "Prepend" or _replaces_one_by_one(step) for step in steps)
    return "characters" if fallback and kept and pre.get("type") in (None, "Metaspace") else None


def _replaces_one_by_one(step: Mapping[str, Any]) -> bool:
    pattern = step["pattern"].get("String", "") if step["type"] == "Replace" else ""
    return len(pattern) == 1 == len(step["content"])


def _spec(part: Any) -> dict[str, Any]:
    """A part as `tokenizer.json` has it; empty where there is none."""
    return {} if part is None else json.loads(part.__getstate__())


def _byte_level(pre: Mapping[str, Any], decoder: Mapping[str, Any], vocab: Mapping[str, int]) -> bool:
    steps = [pre, *pre.get("pretokenizers", [])]
    uses = any(step.get("type") == "ByteLevel" and not step.get("add_prefix_space") for step in steps)
    return uses and decoder.get("type") == "ByteLevel" and vocab.keys() >= set(BYTE_TO_CHAR)


def _keeps_all(pre: Mapping[str, Any]) -> bool:
    kinds = (None, "ByteLevel", "Digits")
    return all(s.get("type") in kinds or s.get("behavior") == "Isolated" for s in pre.get("pretokenizers", [pre]))


def _cuts(pre: Mapping[str, Any], kind: str) -> str | None:
    if kind in ("char", "byte"):
        return "anywhere"
    plain = pre.get("type") == "ByteLevel" and pre.get("use_regex", True) and not pre.get("add_prefix_space")
    return "words" if plain else None


def _lost_at_start(pre: Mapping[str, Any]) -> tuple[str, ...]:
    # Metaspace begins a text with a space, unless the text has one there: `a` and ` a` would have the same ids.
    first = (pre.get("pretokenizers") or [pre])[0]
    prefixes = first.get("type") == "Metaspace" and first.get("prepend_scheme") != "never"
    return (" ", first["replacement"]) if prefixes else ()
