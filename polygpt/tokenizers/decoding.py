"""Tokens to text, for tokenizers whose tokens do not stand for fixed bytes."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from polygpt.tokenizers.bytelevel import token_bytes

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Decoder:
    """The `tokenizers` library's decoder without two of its faults.

    Its `ByteFallback` turns a whole run of byte tokens into U+FFFD when one of them is invalid or a character is
    unfinished. Its `Metaspace` drops every space of the first token, where only the first one is not part of the text.
    """

    def __init__(self, decoder: Any):
        self._decoder = decoder
        spec = {} if decoder is None else json.loads(decoder.__getstate__())
        steps = {step["type"]: step for step in [spec, *spec.get("decoders", [])] if "type" in step}
        self._byte_fallback = "ByteFallback" in steps
        self._byte_level = "ByteLevel" in steps
        self._space = steps.get("Metaspace", {}).get("replacement")

    @property
    def spelled_bytes(self) -> Callable[[str], bytes] | None:
        """Token to bytes, for tokens spelled as sentencepiece does or in GPT-2's alphabet; None for others."""
        if self._byte_level:
            return token_bytes
        return _sentencepiece_bytes if self._byte_fallback else None

    def decode(self, tokens: Sequence[str]) -> str:
        """The text of `tokens`; U+FFFD for bytes that are not UTF-8."""
        if self._decoder is None:
            return " ".join(tokens)
        if self._byte_fallback:
            tokens = [*_keep_valid_bytes(tokens)]
        if self._space is not None and tokens and self._space in tokens[0][1:]:
            cut = tokens[0].index(self._space, 1)
            tokens = [tokens[0][:cut], tokens[0][cut:], *tokens[1:]]
        return self._decoder.decode(list(tokens))

    def decode_after(self, before: str, tokens: Sequence[str]) -> str:
        """The text that `tokens` add to a text whose last token is `before`."""
        if _BYTE.fullmatch(before):
            before = REPLACEMENT  # the rest of its character may lie further back
        text, whole = self.decode([before]), self.decode([before, *tokens])
        return whole[len(text) :] if whole.startswith(text) else self.decode(tokens)


def _sentencepiece_bytes(token: str) -> bytes:
    match = _BYTE.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def _keep_valid_bytes(tokens: Sequence[str]) -> Iterator[str]:
    """`tokens` with U+FFFD in place of those byte tokens that are not part of a whole character."""
    for is_byte, run in itertools.groupby(tokens, key=lambda token: _BYTE.fullmatch(token) is not None):
        if not is_byte:
            yield from run
            continue
        text = bytes(int(token[3:5], 16) for token in run).decode("utf-8", errors="replace")
        for char in text:
            yield from [char] if char == REPLACEMENT else [f"<0x{byte:02X}>" for byte in char.encode()]
