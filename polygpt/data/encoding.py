"""Documents to tokens: which side of the split a text is on, and its ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from polygpt.data.config import DataConfig
from polygpt.data.sources import Document, Source
from polygpt.errors import RequestError
from polygpt.tokenizers import Tokenizer

MANY_DOCUMENTS = 100


class Piece(NamedTuple):
    """A document, or the part of one that is on one side of the split."""

    side: str
    name: str
    text: str
    ends: bool  # whether it is the document's last (or only) piece


class Encoded(NamedTuple):
    """A piece's ids, and how many UTF-8 bytes of its text they stand for and how many are lost."""

    side: str
    ids: np.ndarray
    bytes: int
    lost_bytes: int
    ends: bool


@dataclass(frozen=True)
class Division:
    """How documents are divided into training and validation.

    Attributes:
        validation_fraction: share of documents that are held out, by a hash of their text.
        cut: if not None, the character of the whole text from which on everything is held out instead.
    """

    validation_fraction: float
    cut: int | None = None

    def pieces(self, documents: Iterable[Document], start: int = 0) -> Iterator[Piece]:
        """The pieces of documents, the first of which begins at character `start` of the whole text."""
        for name, text in documents:
            if self.cut is None:
                yield Piece(_side(text, self.validation_fraction), name, text, True)
                continue
            before = max(0, min(self.cut - start, len(text)))
            start += len(text)
            if before:
                yield Piece("train", name, text[:before], before == len(text))
            if before < len(text):
                yield Piece("validation", name, text[before:], True)


def is_by_document(source: Source, config: DataConfig) -> bool:
    """Whether `config.split` assigns whole documents; for `auto` the first ones are read."""
    if config.split != "auto":
        return config.split == "document"
    # Of fewer documents all could fall on one side.
    return sum(1 for _ in islice(source, MANY_DOCUMENTS)) == MANY_DOCUMENTS


def division_at(characters: int, config: DataConfig) -> Division:
    """The division of a text of so many characters that holds out its end."""
    # Rounded down, like nanoGPT's int(n * 0.9).
    return Division(config.validation_fraction, int(characters * (1 - config.validation_fraction)))


def pieces_of(source: Source, config: DataConfig) -> Iterator[Piece]:
    """The pieces of all documents."""
    if is_by_document(source, config):
        return Division(config.validation_fraction).pieces(source)
    return division_at(sum(len(document.text) for document in source), config).pieces(source)


def training_texts(source: Source, config: DataConfig) -> Iterator[str]:
    """The texts on the training side, on which a tokenizer is trained: it must not see held-out text either."""
    return (piece.text for piece in pieces_of(source, config) if piece.side == "train")


def encode(pieces: Iterable[Piece], tokenizer: Tokenizer, batch_chars: int) -> Iterator[Encoded]:
    """The tokens of each piece, after the end-of-text token, if there is one; so many characters at a time.

    Raises:
        RequestError: a text cannot be encoded; its document is named.
    """
    prefix = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], np.int32)
    for batch in _batches(pieces, batch_chars):
        for piece, ids in zip(batch, _encode_batch(batch, tokenizer, batch_chars), strict=True):
            # Held-out text is what bits per byte are measured on: bytes that no token stands for would lower them.
            lost = tokenizer.count_lost(piece.text) if piece.side == "validation" else 0
            length = len(piece.text.encode()) - lost
            yield Encoded(piece.side, np.concatenate([prefix, ids]), length, lost, piece.ends)


def _side(text: str, validation_fraction: float) -> str:
    # A hash of the text: a document that occurs twice is on one side only, whatever the order.
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "big") < validation_fraction * 2**64 else "train"


def _encode_batch(batch: list[Piece], tokenizer: Tokenizer, batch_chars: int) -> list[np.ndarray]:
    try:
        return tokenizer.encode_batch([piece.text for piece in batch], batch_chars)
    except RequestError:
        for piece in batch:  # one at a time, to find whose fault it is
            try:
                tokenizer.encode_batch([piece.text])
            except RequestError as error:
                raise RequestError(f"{piece.name}: {error}") from None
        raise


def _batches(pieces: Iterable[Piece], batch_chars: int) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= batch_chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
