"""Text to ids: in pieces, on every core, and never with text lost unnoticed."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np
import tokenizers as hf

from polygpt.errors import RequestError
from polygpt.tokenizers.structure import Structure

PIECE_CHARS = 1 << 14  # pieces of a long text, so that one document too uses every core
GROUP_CHARS = 1 << 22  # characters in the library's hands at once, by default


class Encoder:
    """Encodes with a tokenizer of the library, whose special tokens are ordinary text in the texts given."""

    def __init__(self, tokenizer: hf.Tokenizer, structure: Structure):
        self._original, self._structure = tokenizer, structure

    @cached_property
    def _plain(self) -> hf.Tokenizer:
        # A BPE without an unknown token drops what it has no token for. With one that does not exist, it fails.
        model = self._original.model
        if type(model) is not hf.models.BPE or model.unk_token or self._structure.byte_level:
            return self._original
        twin = _copy(self._original)
        twin.model.unk_token = "<no such token>"
        return twin

    @cached_property
    def _with_specials(self) -> hf.Tokenizer:
        # A second one, rather than a switch on the first: a server encodes on several threads at once.
        twin = _copy(self._plain)
        twin.encode_special_tokens = False
        return twin

    def encode_special(self, text: str) -> list[int]:
        """The ids of `text`, in which special tokens count.

        Raises:
            RequestError: as `encode_batch`.
        """
        text = self._prepare(text)
        try:
            return self._with_specials.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises plain Exceptions
            raise _unencodable([text], self._with_specials, error) from None

    def encode_batch(self, texts: Sequence[str], group_chars: int = GROUP_CHARS) -> list[np.ndarray]:
        """The ids of each text, int32; on every core, about `group_chars` characters at a time.

        Raises:
            RequestError: a text holds a lone surrogate, or a character that the tokenizer has no token for.
        """
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        for group in _groups(self._pieces(texts), group_chars):
            try:
                encoded = self._plain.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
            except Exception as error:  # the library raises plain Exceptions
                raise _unencodable(texts, self._plain, error) from None
            for (i, _), encoding in zip(group, encoded, strict=True):
                parts[i].append(np.array(encoding.ids, dtype=np.int32))
        return [p[0] if len(p) == 1 else np.concatenate(p) if p else np.zeros(0, np.int32) for p in parts]

    def count_lost(self, text: str) -> int:
        """How many bytes of `text`, in UTF-8, are in none of its tokens, or in unknown tokens."""
        if self._original.normalizer is not None:
            text = unicodedata.normalize("NFC", text)  # or what a tokenizer composes would seem lost
        prepared = self._prepare(text)
        lost = np.ones(len(prepared), bool)
        twin, unknown = self._with_offsets
        encoding = twin.encode(prepared, add_special_tokens=False)
        for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if number != unknown:
                lost[start:end] = False
        lost = lost[len(prepared) - len(text) :]
        return len("".join(text[i] for i in np.flatnonzero(lost)).encode())

    @cached_property
    def _with_offsets(self) -> tuple[hf.Tokenizer, int | None]:
        """A tokenizer whose offsets hold the blanks of a token as well, and the id of its unknown token."""
        twin = _copy(self._plain)
        twin.post_processor = None
        model = json.loads(self._original.to_str())["model"]
        unknown = model.get("unk_token")
        return twin, model.get("unk_id") if unknown is None else self._original.token_to_id(unknown)

    def _pieces(self, texts: Sequence[str]) -> Iterator[tuple[int, str]]:
        for i, text in enumerate(texts):
            for piece in self._structure.cut(self._prepare(text), PIECE_CHARS):
                yield i, piece

    def _prepare(self, text: str) -> str:
        refuse_surrogates(text)
        # The library takes a space that begins a text for the one it would have put there, and so loses it.
        return f" {text}" if text.startswith(self._structure.lost_at_start) else text


def refuse_surrogates(text: str) -> None:
    """Raises `RequestError` if `text` holds half of a surrogate pair, which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise RequestError(
            f"index {error.start} of the text is a lone surrogate ({code}), which is not a character"
        ) from None


def _copy(tokenizer: hf.Tokenizer) -> hf.Tokenizer:
    made = hf.Tokenizer.from_str(tokenizer.to_str())
    made.encode_special_tokens = tokenizer.encode_special_tokens
    return made


def _groups(pieces: Iterable[tuple[int, str]], chars: int) -> Iterator[list[tuple[int, str]]]:
    """`pieces` in lists of about so many characters, none of them empty."""
    group: list[tuple[int, str]] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece[1])
        if size >= chars:
            yield group
            group, size = [], 0
    if group:
        yield group


def _unencodable(texts: Sequence[str], encoder: hf.Tokenizer, error: Exception) -> RequestError:
    """The error that names the first character for which `encoder` has no token."""
    added = encoder.get_added_tokens_decoder().values()
    found = [token.content for token in added if not (token.special and encoder.encode_special_tokens)]
    whole = re.compile("|".join(map(re.escape, found)) or "(?!)")
    if isinstance(encoder.model, hf.models.WordLevel):
        return _unknown_word([part for text in texts for part in whole.split(text)], encoder, error)
    known: set[str] = set()
    for text in texts:
        skip = {at for match in whole.finditer(text) for at in range(*match.span())}
        for at, char in enumerate(text):
            if at not in skip and char not in known and not _can_encode(encoder, char):
                return RequestError(
                    f"character {char!r} (U+{ord(char):04X}) at index {at} of the text has no token in this "
                    "tokenizer;\ntrain the tokenizer on text that has it, or use kind 'byte' or 'bpe', which hold "
                    "every text"
                )
            known.add(char)
    return _cannot_encode(error)


def _unknown_word(texts: Sequence[str], encoder: hf.Tokenizer, error: Exception) -> RequestError:
    """The error that names the first word that is no token of a tokenizer of whole words."""
    normalizer, splitter = encoder.normalizer, encoder.pre_tokenizer
    for text in texts:
        text = text if normalizer is None else normalizer.normalize_str(text)
        words = [text] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(text)]
        for word in words:
            if word and encoder.token_to_id(word) is None:
                return RequestError(
                    f"the word {word!r:.60} is no token of this tokenizer, which has whole words alone and none for "
                    "unknown ones;\ntrain the tokenizer on text that has it, or use kind 'byte' or 'bpe', which hold "
                    "every text"
                )
    return _cannot_encode(error)


def _cannot_encode(error: Exception) -> RequestError:
    return RequestError(f"the tokenizer cannot encode this text ({str(error).splitlines()[0]})")


def _can_encode(encoder: hf.Tokenizer, text: str) -> bool:
    try:
        encoder.encode(text, add_special_tokens=False)
    except Exception:  # the library raises plain Exceptions
        return False
    return True
