"""How published models split a text before byte-level BPE, under the names of GGUF's `tokenizer.ggml.pre`.

llama.cpp has a list of regular expressions for each name (src/llama-vocab.cpp), each applied to the pieces that the one
before it leaves. Where a model's own tokenizer.json does the same with other parts of the library, those are used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tokenizers as hf
from tokenizers import normalizers, pre_tokenizers

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}{_WORDS}|\p{{N}}{{1,3}}{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}{_WORDS}|\p{{N}}{_REST}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class PreTokenizer(NamedTuple):
    """How one family of models splits a text.

    Attributes:
        steps: the pre-tokenizers, in order.
        nfc: whether the text is normalised to NFC first.
        ignore_merges: whether a word that is a token becomes that token, whatever the merges give.
        start: whether a start token is put before a text if the file does not say.
    """

    steps: tuple[Any, ...]
    nfc: bool = False
    ignore_merges: bool = False
    start: bool = False

    def apply(self, made: hf.Tokenizer) -> None:
        """Sets the normalizer and pre-tokenizer of `made`; `ignore_merges` belongs to its model."""
        made.pre_tokenizer = self.steps[0] if len(self.steps) == 1 else pre_tokenizers.Sequence(list(self.steps))
        if self.nfc:
            made.normalizer = normalizers.NFC()


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(hf.Regex(pattern), "isolated")


def _bytes(use_regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


_PLAIN = PreTokenizer((_bytes(True),))
_DIGITS = PreTokenizer((pre_tokenizers.Digits(individual_digits=True), _bytes(True)))
# What llama.cpp does without a name.
_DEFAULT = PreTokenizer(
    (
        *map(_split, (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        _bytes(False),
    )
)
_LLAMA3_PRE = PreTokenizer((_split(_LLAMA3), _bytes(False)), ignore_merges=True, start=True)
_QWEN2_PRE = PreTokenizer((_split(_QWEN2), _bytes(False)), nfc=True)

# Export writes the first name that fits.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": _PLAIN,
    "mpt": _PLAIN,
    "olmo": _PLAIN,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "llama-bpe": _LLAMA3_PRE,
    "llama3": _LLAMA3_PRE,
    "llama-v3": _LLAMA3_PRE,
    "qwen2": _QWEN2_PRE,
    "default": _DEFAULT,
}
