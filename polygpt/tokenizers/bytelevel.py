"""GPT-2's alphabet of bytes: every byte value written as one visible character."""

from __future__ import annotations


def _alphabet() -> list[str]:
    # The printable bytes of Latin-1 stand for themselves, the others for the code points from 256 on, in
    # order (`bytes_to_unicode` in github.com/openai/gpt-2, src/encoder.py).
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(256, 512))
    return [chr(byte if byte in visible else next(rest)) for byte in range(256)]


BYTE_TO_CHAR = _alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


def token_bytes(token: str) -> bytes:
    """The bytes a byte-level token stands for; a character outside the alphabet stands for its own UTF-8."""
    return b"".join(bytes([CHAR_TO_BYTE[c]]) if c in CHAR_TO_BYTE else c.encode() for c in token)
