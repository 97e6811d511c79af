"""What a `tokenizer.json` is made of, as far as encoding and decoding depend on it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from polygpt.tokenizers.bytelevel import BYTE_TO_CHAR


@dataclass(frozen=True)
class Structure:
    """Facts read off a tokenizer, whoever wrote it."""

    kind: str
    """`char`, `byte`, or the library's name of the model in lower case."""
    byte_level: bool
    """Every byte has a token, written in GPT-2's alphabet."""
    alphabet: frozenset[str]
    """The characters of kind `char`; empty for others."""
    added: frozenset[str]
    """Tokens beside the model's vocabulary, special ones included; their text stands for itself."""
    cuts: str | None
    """Where a text may be cut without changing its ids: `anywhere`, `words`, or None for nowhere known."""

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


def describe_structure(spec: Mapping[str, Any]) -> Structure:
    """The `Structure` of a `tokenizer.json`, parsed."""
    model, pre = spec["model"], spec["pre_tokenizer"]
    vocab = model.get("vocab") or {}
    merges = model.get("merges")
    letters = model.get("type") == "BPE" and not merges and not spec["normalizer"]
    kind = str(model.get("type", "unknown")).lower()
    byte_level = _byte_level(spec, vocab)
    if letters and pre is None and vocab and all(len(token) == 1 for token in vocab):
        kind = "char"
    elif letters and byte_level and all(vocab[char] == byte for byte, char in enumerate(BYTE_TO_CHAR)):
        kind = "byte"
    return Structure(
        kind=kind,
        byte_level=byte_level,
        alphabet=frozenset(vocab) if kind == "char" else frozenset(),
        added=frozenset(token["content"] for token in spec["added_tokens"]),
        cuts=_cuts(spec, kind),
    )


def _byte_level(spec: Mapping[str, Any], vocab: Any) -> bool:
    pre, decoder = spec["pre_tokenizer"] or {}, spec["decoder"] or {}
    steps = [pre, *pre.get("pretokenizers", [])]
    uses = any(step.get("type") == "ByteLevel" and not step.get("add_prefix_space") for step in steps)
    uses = uses and decoder.get("type") == "ByteLevel"
    return uses and isinstance(vocab, dict) and vocab.keys() >= set(BYTE_TO_CHAR)


def _cuts(spec: Mapping[str, Any], kind: str) -> str | None:
    if spec["normalizer"] or any(not token["special"] for token in spec["added_tokens"]):
        return None  # an added token that is not special is found in any text, across a cut too
    if kind in ("char", "byte"):
        return "anywhere"
    pre = spec["pre_tokenizer"] or {}
    plain = pre.get("type") == "ByteLevel" and pre.get("use_regex", True) and not pre.get("add_prefix_space")
    return "words" if plain else None
