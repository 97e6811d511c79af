"""Preparation: documents to token shards, in a folder that is renamed into place once it is complete."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from polygpt.data.config import DataConfig
from polygpt.data.shards import (
    DTYPES,
    FORMAT,
    MANIFEST,
    OFFSET,
    SPLITS,
    FileEntry,
    Manifest,
    ShardEntry,
    Shards,
    SplitEntry,
    open_shards,
)
from polygpt.data.sources import Source
from polygpt.errors import RequestError
from polygpt.files import expand, new_folder
from polygpt.tokenizers import Tokenizer

SHARD_TOKENS = 100_000_000
BATCH_CHARS = 1 << 20
MANY_DOCUMENTS = 100


class _Part(NamedTuple):
    """A document, or the part of one that is on one side of the split."""

    side: str
    name: str
    text: str
    ends: bool  # whether it is the document's last (or only) part


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    out: str | Path,
    config: DataConfig,
    *,
    progress: Callable[[int], None] | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Shards:
    """Tokenizes `source` into shards in the new folder `out`; `progress` gets the number of documents done.

    Each document is preceded by the tokenizer's end-of-text token, if there is one, so that every token of a document
    is predicted and a model learns to stop. A new shard begins once one holds `shard_tokens`.

    Raises:
        RequestError: `out` exists, the source cannot be read or tokenized, or one side of the split would be empty.
        PolygptError: `out` cannot be written.
    """
    out = expand(out)
    if out.exists():
        raise RequestError(f"{out}: exists already; choose another folder, or remove it first")
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    with new_folder(out) as partial:
        with ExitStack() as stack:
            writers = {name: stack.enter_context(_SplitWriter(partial, name, dtype, shard_tokens)) for name in SPLITS}
            _write(_parts(source, config), tokenizer, writers, progress)
            entries = {name: writer.finish(config) for name, writer in writers.items()}
        _write_manifest(partial / MANIFEST, _manifest(source, tokenizer, dtype, entries))
    return open_shards(out, tokenizer)


def _manifest(source: Source, tokenizer: Tokenizer, dtype: str, entries: dict[str, SplitEntry]) -> Manifest:
    return Manifest(
        format=FORMAT,
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        tokenizer=tokenizer.fingerprint,
        source=source.describe(),
        invalid_documents=source.tally.invalid,
        **entries,
    )


def _write_manifest(path: Path, manifest: Manifest) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(manifest.to_dict(), indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def training_texts(source: Source, config: DataConfig) -> Iterator[str]:
    """The texts on the training side, on which a tokenizer is trained: it must not see held-out text either."""
    return (part.text for part in _parts(source, config) if part.side == "train")


def _parts(source: Source, config: DataConfig) -> Iterator[_Part]:
    # Of fewer documents all could fall on one side.
    many = config.split == "auto" and sum(1 for _ in islice(source, MANY_DOCUMENTS)) == MANY_DOCUMENTS
    if config.split == "document" or many:
        for document in source:
            side = _side(document.text, config.validation_fraction)
            yield _Part(side, document.name, document.text, True)
        return
    total = sum(len(document.text) for document in source)
    cut = int(total * (1 - config.validation_fraction))  # rounded down, like nanoGPT's int(n * 0.9)
    start = 0
    for name, text in source:
        before = max(0, min(cut - start, len(text)))
        start += len(text)
        if before:
            yield _Part("train", name, text[:before], before == len(text))
        if before < len(text):
            yield _Part("validation", name, text[before:], True)


def _side(text: str, validation_fraction: float) -> str:
    # A hash of the text: a document that occurs twice is on one side only, whatever the order.
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "big") < validation_fraction * 2**64 else "train"


def _write(
    parts: Iterable[_Part],
    tokenizer: Tokenizer,
    writers: dict[str, _SplitWriter],
    progress: Callable[[int], None] | None,
) -> None:
    prefix = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], np.int32)
    done = 0
    for batch in _batches(parts):
        for part, ids in zip(batch, _encode(batch, tokenizer), strict=True):
            # Held-out text is what bits per byte are measured on: bytes that no token stands for would lower them.
            lost = tokenizer.count_lost(part.text) if part.side == "validation" else 0
            writers[part.side].add(np.concatenate([prefix, ids]), len(part.text.encode()) - lost, lost)
        done += sum(part.ends for part in batch)
        if progress is not None:
            progress(done)


def _encode(batch: list[_Part], tokenizer: Tokenizer) -> list[np.ndarray]:
    try:
        return tokenizer.encode_batch([part.text for part in batch])
    except RequestError:
        for part in batch:  # one at a time, to find whose fault it is
            try:
                tokenizer.encode_batch([part.text])
            except RequestError as error:
                raise RequestError(f"{part.name}: {error}") from None
        raise


def _batches(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _SplitWriter(AbstractContextManager):
    """Writes the documents of one side, shard after shard; on exit it closes the current file."""

    def __init__(self, folder: Path, name: str, dtype: str, shard_tokens: int):
        self.folder, self.name, self.dtype, self.shard_tokens = folder, name, DTYPES[dtype], shard_tokens
        self.shards: list[ShardEntry] = []
        self.bytes = self.lost_bytes = 0
        self.stream = None

    def __exit__(self, *error: object) -> None:
        if self.stream is not None:
            self.stream.close()

    def add(self, ids: np.ndarray, text_bytes: int, lost_bytes: int) -> None:
        """Adds a document: its ids, and how many UTF-8 bytes of its text they stand for and how many are lost."""
        if not len(ids):  # some tokenizers encode white space to nothing
            return
        if self.stream is None:
            self.stream = (self.folder / f"{self.name}-{len(self.shards):05d}.tokens").open("wb")
            self.digest, self.tokens, self.offsets = hashlib.sha256(), 0, array("q")
        data = ids.astype(self.dtype).tobytes()
        self.stream.write(data)
        self.digest.update(data)
        self.offsets.append(self.tokens)
        self.tokens += len(ids)
        self.bytes += text_bytes
        self.lost_bytes += lost_bytes
        if self.tokens >= self.shard_tokens:
            self._close()

    def _close(self) -> None:
        self.stream.close()
        tokens_path = Path(self.stream.name)
        offsets_path = tokens_path.with_suffix(".offsets")
        offsets = np.array(self.offsets, OFFSET).tobytes()
        offsets_path.write_bytes(offsets)
        self.shards.append(
            ShardEntry(
                tokens_file=FileEntry(name=tokens_path.name, sha256=self.digest.hexdigest()),
                offsets_file=FileEntry(name=offsets_path.name, sha256=hashlib.sha256(offsets).hexdigest()),
                tokens=self.tokens,
                documents=len(self.offsets),
            )
        )
        self.stream = None

    def finish(self, config: DataConfig) -> SplitEntry:
        """The entry of this side in the manifest."""
        if self.stream is not None:
            self._close()
        if not self.shards:
            fix = "set data.split to 'fraction'" if config.split == "document" else "give more text"
            raise RequestError(
                f"no text is on the {self.name} side (data.split '{config.split}', "
                f"data.validation_fraction {config.validation_fraction});\n{fix}, or change the fraction"
            )
        return SplitEntry(
            documents=sum(shard.documents for shard in self.shards),
            tokens=sum(shard.tokens for shard in self.shards),
            bytes=max(self.bytes, 1),
            lost_bytes=self.lost_bytes,
            shards=tuple(self.shards),
        )
