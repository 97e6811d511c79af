"""Text to ids and back, through one `tokenizer.json` of the `tokenizers` library.

Knows nothing of models or data sets. Encoding adds nothing (no start token, no padding) and cuts nothing
off; a text with a character for which there is neither a token nor an unknown token is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as hf

from polygpt.errors import PolygptError, RequestError, TooLong
from polygpt.tokenizers.bytelevel import BYTE_TO_CHAR, token_bytes
from polygpt.tokenizers.config import END_OF_TEXT
from polygpt.tokenizers.decoding import REPLACEMENT, Decoder
from polygpt.tokenizers.encoding import GROUP_CHARS, Encoder, refuse_surrogates
from polygpt.tokenizers.structure import describe_structure
from polygpt.tokenizers.typed import unmark

# What published models call the end of a text, the commonest first.
END_TOKENS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "[EOS]")
FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
CHECKED = 2**16  # characters of a text from which on its length alone may refuse it


class Tokenizer:
    """Encodes and decodes. Make one with `train_tokenizer` or `load_tokenizer`.

    Attributes:
        kind: `char`, `byte`, or the library's name for the model (`bpe`, `unigram`, `wordpiece`, ...).
        vocab_size: the largest id plus one.
        end_of_text: the id of the token that ends a text, if there is one.
        dropout: the BPE dropout that its file asks for. It is off: a text always has the same ids.
        start: the ids that the tokenizer.json puts before a text (mostly one start token); `encode` leaves them out.
        special_tokens: the special tokens with their ids.
        roles: the text of the token for each role that is known (`bos_token`, `eos_token`, `pad_token`, ...).
        fingerprint: SHA-256, in hexadecimal, of everything that decides the ids.
    """

    def __init__(self, tokenizer: hf.Tokenizer, roles: Mapping[str, Any] | None = None):
        """Takes over `tokenizer`, whose truncation, padding and dropout are switched off.

        Args:
            tokenizer: of the library.
            roles: the token of each role (`eos_token`, `pad_token`, ...): its text, an object with `content` as
                tokenizer_config.json has it, or its id, which counts only if it is a special token's. Without
                `eos_token` the end of a text is guessed by name.

        Raises:
            RequestError: the vocabulary is empty, or a role's token is something else.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.dropout: float | None = getattr(tokenizer.model, "dropout", None) or None
        if self.dropout is not None:
            tokenizer.model.dropout = None
        tokenizer.encode_special_tokens = True  # that is: special tokens that a user types are ordinary text
        self._plain = tokenizer
        vocab, added = tokenizer.get_vocab(with_added_tokens=False), tokenizer.get_added_tokens_decoder()
        if not vocab and not added:
            raise RequestError("this tokenizer has an empty vocabulary")
        self.special_tokens: dict[str, int] = {token.content: i for i, token in added.items() if token.special}
        self.roles = self._read_roles(roles or {})
        self._structure = describe_structure(tokenizer, vocab)
        self._encoder, self._decoder = Encoder(tokenizer, self._structure), Decoder(tokenizer.decoder)
        self.kind = self._structure.kind
        self.vocab_size = max([*vocab.values(), *added]) + 1  # not the number of tokens: some files have holes
        self.start = _start(tokenizer.post_processor)
        ends = (self.role("eos_token"), *map(self.special_tokens.get, END_TOKENS))
        self.end_of_text = next((end for end in ends if end is not None), None)

    def _read_roles(self, roles: Mapping[str, Any]) -> dict[str, str]:
        """The text of each role's token; those that the vocabulary has become special tokens."""
        names = {number: token for token, number in self.special_tokens.items()}
        texts = {role: names.get(value) if type(value) is int else token_text(value) for role, value in roles.items()}
        found = {role: text for role, text in texts.items() if text is not None}
        for text in dict.fromkeys(found.values()):
            number = self._plain.token_to_id(text)
            if number is not None and text not in self.special_tokens:
                self._plain.add_special_tokens([hf.AddedToken(text, normalized=False)])
                self.special_tokens[text] = number
        return found

    def role(self, name: str) -> int | None:
        """The id of the token with this role (`bos_token`, `eos_token`, `pad_token`, ...), if there is one."""
        return self._plain.token_to_id(self.roles[name]) if name in self.roles else None

    def __repr__(self) -> str:
        return f"Tokenizer({self.kind}, {self.vocab_size} ids, {self.fingerprint[:12]})"

    @cached_property
    def fingerprint(self) -> str:
        canonical = json.dumps(
            json.loads(self._plain.to_str()), sort_keys=True, separators=(",", ":"), ensure_ascii=False
        )
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def _tokens(self) -> dict[int, str]:
        return {i: token for token, i in self._plain.get_vocab(with_added_tokens=True).items()}

    @cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        added = self._structure.added
        to_bytes = token_bytes if self._structure.byte_level else str.encode
        return {i: t.encode() if t in added else to_bytes(t) for i, t in self._tokens.items()}

    @cached_property
    def _longest(self) -> tuple[int, int]:
        """Characters of the longest token as it is spelled (where it is byte-level, bytes), and of a special one."""
        sizes = {
            token: len(token.encode() if token in self._structure.added else token) for token in self._tokens.values()
        }
        special = max((sizes.pop(token, 1) for token in self.special_tokens), default=1)
        return max(sizes.values(), default=1), special

    def check_length(self, text: str, most: int | None, *, special: bool = False) -> None:
        """Refuses a text that must have more than `most` tokens, without encoding it; None is no limit.

        A text that passes may be too long all the same: its characters divided by those of the longest token are a
        lower bound, and not every kind of tokenizer has one. Shorter ones than `CHECKED` pass: they are soon counted.

        Raises:
            RequestError: `TooLong`, which names the bound; or the text holds a lone surrogate.
        """
        if most is None or self._structure.spells is None or len(text) < max(CHECKED, most):
            return
        refuse_surrogates(text)
        size = len(text.encode()) if self._structure.spells == "bytes" else len(text)
        least = -(-size // (max(self._longest) if special else self._longest[0]))
        if least > most:
            raise TooLong(least, most)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of `text`. Special tokens written in it are ordinary text unless `special` is set.

        Raises:
            RequestError: the text holds a lone surrogate, or a character that the tokenizer has no token for.
        """
        return self._encoder.encode_special(text) if special else self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str], group_chars: int = GROUP_CHARS) -> list[np.ndarray]:
        """The ids of each text, int32, special tokens as ordinary text; on every core.

        About `group_chars` characters are encoded at once, which takes about 100 bytes of memory for each token.

        Raises:
            RequestError: as `encode`.
        """
        return self._encoder.encode_batch(texts, group_chars)

    def count_lost(self, text: str) -> int:
        """How many bytes of `text`, in UTF-8, its ids do not stand for.

        Some tokenizers drop blanks, or have one unknown token for whole words. Such bytes must not count where a number
        of bits is divided by a number of bytes.
        """
        return 0 if self._structure.lossless else self._encoder.count_lost(text)

    def encode_marked(self, text: str) -> list[int]:
        """The ids of `text`; its special tokens count, except for those that `mark_tokens` has marked.

        Raises:
            RequestError: as `encode`.
        """
        if unmark(text) == text:
            return self.encode(text, special=True)
        added = {token.content: token for token in self._plain.get_added_tokens_decoder().values() if token.special}
        # The text at even places, the special tokens between.
        parts = re.split(f"({'|'.join(map(re.escape, sorted(added, key=len, reverse=True)))})", text)
        ids: list[int] = []
        for i in range(0, len(parts), 2):
            if i:
                ids.append(self.special_tokens[parts[i - 1]])
            part = parts[i].lstrip() if i and added[parts[i - 1]].rstrip else parts[i]
            part = part.rstrip() if i + 1 < len(parts) and added[parts[i + 1]].lstrip else part
            ids += self.encode(unmark(part))
        return ids

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes: runs of valid UTF-8 as text, every other byte as its own token.

        Raises:
            RequestError: this tokenizer has no token for some bytes (it is not byte-level).
        """
        if not self._structure.byte_level:
            raise RequestError(f"a tokenizer of kind '{self.kind}' encodes text, not bytes; use 'byte' or 'bpe'")
        # Python's surrogateescape marks each byte that is not UTF-8 as one character of U+DC80..U+DCFF.
        runs = re.split("([\udc80-\udcff])", data.decode("utf-8", "surrogateescape"))
        encoded = iter(self.encode_batch(runs[::2]))
        ids = next(encoded).tolist()
        for byte, run in zip(runs[1::2], encoded, strict=True):
            ids.append(self._plain.token_to_id(BYTE_TO_CHAR[ord(byte) - 0xDC00]))
            ids.extend(run.tolist())
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens shown; U+FFFD for invalid UTF-8 and for ids without a token.

        A model may have more ids than its tokenizer (a vocabulary padded to a round number), so an id without a token
        is not an error.
        """
        if self._structure.exact:
            return self.decode_bytes(ids).decode("utf-8", errors="replace")
        return self._decoder.decode(self._tokens_of(ids))

    def decode_after(self, context: Sequence[int], ids: Iterable[int]) -> str:
        """The text that `ids` add when they follow `context`, such as a prompt's ids.

        Some tokenizers drop the space before the first word of what they decode; it stays where text comes before.
        Where `context` is empty, or a start token alone, this is `decode(ids)`.
        """
        if self._structure.exact or not len(context) or tuple(context) == self.start:
            return self.decode(ids)
        (before,) = self._tokens_of(context[-1:])
        return self._decoder.decode_after(before, self._tokens_of(ids))

    def _tokens_of(self, ids: Iterable[int]) -> list[str]:
        return [self._tokens.get(int(i), REPLACEMENT) for i in ids]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`: exact for `char`, `byte` and byte-level BPE, else `decode` in UTF-8."""
        if not self._structure.exact:
            return self.decode(ids).encode()
        unknown = REPLACEMENT.encode()
        return b"".join(self._token_bytes.get(int(i), unknown) for i in ids)

    def vocabulary_bytes(self) -> list[bytes]:
        """The bytes that each id stands for, in the order of ids; none for an id without a token.

        Raises:
            RequestError: tokens of this kind of tokenizer do not stand for fixed bytes.
        """
        if self._structure.exact:
            return [self._token_bytes.get(i, b"") for i in range(self.vocab_size)]
        spelled = self._decoder.spelled_bytes
        if spelled is None:
            raise RequestError(f"the tokens of a tokenizer of kind '{self.kind}' do not stand for fixed bytes")
        tokens, added = [self._tokens.get(i, "") for i in range(self.vocab_size)], self._structure.added
        return [token.encode() if token in added else spelled(token) for token in tokens]

    def to_json(self) -> str:
        """The tokenizer.json."""
        return self._plain.to_str(pretty=True)

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer.json at `path`, and beside it a tokenizer_config.json if roles are known.

        Each file is written whole or not at all. A missing folder is made.

        Raises:
            PolygptError: it cannot be written there.
        """
        path = Path(path)
        _write(path, self.to_json())
        if self.roles and path.name == FILE:
            _write(path.with_name(CONFIG_FILE), json.dumps(self.roles, indent=2, ensure_ascii=False) + "\n")


def token_text(value: Any) -> str | None:
    """The text of a token that is given as such, or as an object with `content`.

    Raises:
        RequestError: it is neither, and not None.
    """
    text = value.get("content") if isinstance(value, Mapping) else value
    if text is not None and not isinstance(text, str):
        raise RequestError(f"{value!r} is not a token: give its text, or an object whose content is its text")
    return text


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise PolygptError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        partial.unlink(missing_ok=True)


def _start(post_processor: Any) -> tuple[int, ...]:
    # The post-processor alone decides, so it is asked about a token of its own: of the tokenizer's, any text may
    # encode to nothing.
    probe = hf.Tokenizer(hf.models.WordLevel({"x": 0}, unk_token="x"))
    probe.post_processor = post_processor
    encoding = probe.encode("x", add_special_tokens=True)
    return tuple(encoding.ids[: encoding.special_tokens_mask.index(0)])
