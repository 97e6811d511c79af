"""Prepared shards: flat files of token ids and of document offsets, and a manifest that verifies them.

A folder holds `train-00000.tokens` (little-endian uint16, or uint32 where the vocabulary needs it),
`train-00000.offsets` (little-endian int64: where each document starts in its shard), the same for
`validation`, and `manifest.json`. A document is never split over two shards.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from polygpt.config import Config, Tuple, validate
from polygpt.data.config import DataConfig
from polygpt.errors import PolygptError, RequestError
from polygpt.files import expand
from polygpt.tokenizers import Tokenizer

MANIFEST = "manifest.json"
FORMAT = 1
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
OFFSET = np.dtype("<i8")
SPLITS = ("train", "validation")
AGAIN = "prepare the data again (polygpt data prepare)"


class FileEntry(Config):
    """A file beside the manifest."""

    name: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class ShardEntry(Config):
    """One shard: `tokens` ids and `documents` offsets."""

    tokens_file: FileEntry
    offsets_file: FileEntry
    tokens: int = Field(ge=1)
    documents: int = Field(ge=1)


class SplitEntry(Config):
    """One side of the split; `bytes` is the length of its text in UTF-8, without `lost_bytes` (see `_write`)."""

    documents: int = Field(ge=1)
    tokens: int = Field(ge=1)
    bytes: int = Field(ge=1)
    lost_bytes: int = Field(0, ge=0)
    shards: Tuple[ShardEntry] = Field(min_length=1)


class Dropped(Config):
    """Documents that were left out: without text, not UTF-8 (if they are skipped), or encoded to no token at all."""

    empty: int = Field(0, ge=0)
    invalid: int = Field(0, ge=0)
    without_tokens: int = Field(0, ge=0)


class Manifest(Config):
    """What a folder of shards contains."""

    format: int
    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(ge=1)
    end_of_text: int | None
    tokenizer: str
    """The tokenizer's fingerprint."""
    source: str
    invalid_documents: int = Field(ge=0)
    """Documents that were not UTF-8, and were replaced or skipped."""
    dropped: Dropped = Dropped()
    train: SplitEntry
    validation: SplitEntry


class TokenSplit:
    """The token stream of one side of the split, read through memory maps.

    Attributes:
        tokens, documents, bytes: counts; `bytes` of the raw text in UTF-8, for bits per byte.
        end_of_text: the id before each document; None if the tokenizer has none.
        fingerprint: SHA-256, in hexadecimal, of the SHA-256 sums of the files.
    """

    def __init__(self, name: str, entry: SplitEntry, folder: Path, dtype: np.dtype, end_of_text: int | None = None):
        """Maps the files, which `open_shards` has verified."""
        self.end_of_text = end_of_text
        self.name, self.tokens, self.documents, self.bytes = name, entry.tokens, entry.documents, entry.bytes
        hashes = [file.sha256 for s in entry.shards for file in (s.tokens_file, s.offsets_file)]
        self.fingerprint = hashlib.sha256("".join(hashes).encode()).hexdigest()
        self._ids = [_mapped(folder / s.tokens_file.name, dtype, at_random=True) for s in entry.shards]
        self._offsets = [_mapped(folder / s.offsets_file.name, OFFSET) for s in entry.shards]
        self._starts = [0, *accumulate(s.tokens for s in entry.shards)]
        self._first_documents = [0, *accumulate(s.documents for s in entry.shards)]

    @classmethod
    def joined(cls, splits: Sequence[TokenSplit]) -> TokenSplit:
        """Several splits as one stream, in order."""
        one = copy(splits[0])
        for name in ("tokens", "documents", "bytes"):
            setattr(one, name, sum(getattr(split, name) for split in splits))
        one.fingerprint = hashlib.sha256("".join(split.fingerprint for split in splits).encode()).hexdigest()
        one._ids = [ids for split in splits for ids in split._ids]
        one._offsets = [offsets for split in splits for offsets in split._offsets]
        one._starts = [0, *accumulate(len(ids) for ids in one._ids)]
        one._first_documents = [0, *accumulate(len(offsets) for offsets in one._offsets)]
        return one

    def __len__(self) -> int:
        return self.tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of the stream, across shards: int32 `[stop - start]`.

        Raises:
            IndexError: the range is not within the stream.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.name}, which has {self.tokens}")
        out = np.empty(stop - start, np.int32)
        shard = bisect_right(self._starts, start) - 1
        filled = 0
        while filled < len(out):
            offset = start + filled - self._starts[shard]
            part = self._ids[shard][offset : offset + len(out) - filled]
            _read_ahead(self._ids[shard], offset, len(part))
            out[filled : filled + len(part)] = part
            filled, shard = filled + len(part), shard + 1
        return out

    def document_offsets(self) -> np.ndarray:
        """Where each document starts in the stream, and the stream's length: int64 `[documents + 1]`."""
        starts = [offsets + start for offsets, start in zip(self._offsets, self._starts, strict=False)]
        return np.concatenate([*starts, [self.tokens]]).astype(np.int64)

    def document(self, i: int) -> np.ndarray:
        """The tokens of document `i`, int32, including the end-of-text token before it if the tokenizer has one.

        Raises:
            IndexError: there is no document `i`.
        """
        if not 0 <= i < self.documents:
            raise IndexError(f"document {i} of {self.name}, which has {self.documents}")
        shard = bisect_right(self._first_documents, i) - 1
        offsets, first = self._offsets[shard], self._starts[shard]
        local = i - self._first_documents[shard]
        stop = int(offsets[local + 1]) if local + 1 < len(offsets) else len(self._ids[shard])
        return self.read(first + int(offsets[local]), first + stop)


def _mapped(path: Path, dtype: np.dtype, at_random: bool = False) -> np.ndarray:
    """The array in a file, read as it is used; `at_random` tells the system not to read ahead on its own.

    Reading ahead, it would fetch as much as 8 MB around each shuffled window of 2 kB.
    """
    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if at_random and hasattr(mmap, "MADV_RANDOM"):
        with suppress(OSError):
            mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype)


def _read_ahead(array: np.ndarray, start: int, count: int) -> None:
    """Tells the system which elements of a mapped file are read next, so that it fetches their pages at once."""
    if hasattr(mmap, "MADV_WILLNEED"):
        first = start * array.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
        with suppress(OSError):  # it is advice, which some systems do not take
            array.base.obj.madvise(mmap.MADV_WILLNEED, first, (start + count) * array.itemsize - first)


class Shards:
    """Prepared data: `train`, `validation`, and the `manifest` that they were verified with."""

    def __init__(self, folder: Path, manifest: Manifest):
        """Maps the files, which `open_shards` has verified."""
        self.folder, self.manifest = folder, manifest
        dtype = DTYPES[manifest.dtype]
        self.train = TokenSplit("train", manifest.train, folder, dtype, manifest.end_of_text)
        self.validation = TokenSplit("validation", manifest.validation, folder, dtype, manifest.end_of_text)


class JoinedShards:
    """The shards of several sources, by name.

    `train` and `validation` are those of all sources together, and `manifest` is the first source's: tokenizer and
    end-of-text token are the same in all.
    """

    def __init__(self, sources: dict[str, Shards]):
        self.sources, shards = sources, list(sources.values())
        self.manifest = shards[0].manifest
        self.train = TokenSplit.joined([each.train for each in shards])
        self.validation = TokenSplit.joined([each.validation for each in shards])


def is_prepared(config: DataConfig) -> bool:
    """Whether `config.path` is a folder of prepared shards rather than text."""
    return not config.sources and len(config.paths) == 1 and (expand(config.paths[0]) / MANIFEST).is_file()


def open_shards(folder: str | Path, tokenizer: Tokenizer | None = None) -> Shards:
    """The shards in `folder`, every file checked against the manifest, and the ids against `tokenizer`.

    Raises:
        RequestError: there is no manifest, a file is missing, truncated or changed, or it was prepared with another
            tokenizer.
    """
    folder = expand(folder)
    manifest = _read_manifest(folder)
    if tokenizer is not None and tokenizer.fingerprint != manifest.tokenizer:
        raise RequestError(
            f"{folder}: prepared with another tokenizer ({manifest.vocab_size} ids, fingerprint "
            f"{manifest.tokenizer[:12]}) than the one given ({tokenizer.vocab_size} ids, fingerprint "
            f"{tokenizer.fingerprint[:12]});\n"
            f"use the tokenizer it was prepared with, or {AGAIN}"
        )
    for split in (manifest.train, manifest.validation):
        for shard in split.shards:
            _check_file(folder, shard.tokens_file, shard.tokens * DTYPES[manifest.dtype].itemsize)
            _check_file(folder, shard.offsets_file, shard.documents * OFFSET.itemsize)
    return Shards(folder, manifest)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"{folder}: no folder of prepared shards (it has no {MANIFEST}); {AGAIN}") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not JSON ({error}); {AGAIN}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else None
        raise RequestError(f"{path}: format {found!r} is not {FORMAT}, the one read here; {AGAIN}")
    manifest = validate(Manifest, data, str(path))
    for name in SPLITS:
        split: SplitEntry = getattr(manifest, name)
        for count in ("tokens", "documents"):
            total = sum(getattr(shard, count) for shard in split.shards)
            if total != getattr(split, count):
                raise RequestError(f"{path}: {name}.{count} is not the sum over its shards ({total}); {AGAIN}")
    return manifest


def _check_file(folder: Path, entry: FileEntry, size: int) -> None:
    name, path = entry.name, folder / entry.name
    if name in ("", ".", "..") or "/" in name or "\\" in name or ":" in name or "\0" in name:
        raise RequestError(f"{folder / MANIFEST}: {name!r} is not the name of a file in the same folder")
    try:
        found = path.stat().st_size
        if found != size:
            raise RequestError(f"{path}: has {found} bytes, its manifest says {size}: truncated or changed; {AGAIN}")
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise RequestError(f"{path}: missing, though its manifest lists it; {AGAIN}") from None
    except OSError as error:
        raise PolygptError(f"{path}: reading failed ({error.strerror})") from None
    if digest != entry.sha256:
        raise RequestError(f"{path}: changed since it was prepared (its SHA-256 differs); {AGAIN}")
