"""Preparation: documents to token shards, in a folder that is renamed into place once it is complete."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from polygpt.data.config import DataConfig
from polygpt.data.encoding import encode, pieces_of
from polygpt.data.shards import (
    DTYPES,
    FORMAT,
    MANIFEST,
    OFFSET,
    SPLITS,
    Dropped,
    FileEntry,
    Manifest,
    ShardEntry,
    Shards,
    SplitEntry,
    open_shards,
)
from polygpt.data.sources import Source, Tally
from polygpt.data.tasks import TOKENIZER, Counts, documents_of, plan, write_plan
from polygpt.data.workers import Pool, Progress
from polygpt.errors import PolygptError, RequestError
from polygpt.files import expand, new_folder, remove_folder
from polygpt.tokenizers import Tokenizer

SHARD_TOKENS = 100_000_000


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

    The tokenizer is saved beside them.

    Each document is preceded by the tokenizer's end-of-text token, if there is one, so that every token of a document
    is predicted and a model learns to stop. A new shard begins once one holds `shard_tokens`.

    Raises:
        RequestError: `out` exists, the source cannot be read or tokenized, or one side of the split would be empty.
        PolygptError: `out` cannot be written.
    """
    with _new_shards(source, tokenizer, out, config, shard_tokens) as writers:
        done = 0
        for found in encode(pieces_of(source, config), tokenizer, config.batch_chars):
            writers[found.side].add(found.ids, found.bytes, found.lost_bytes)
            done += found.ends
            if found.ends and progress is not None:
                progress(done)
    return open_shards(out, tokenizer)


def prepare_in_parallel(
    source: Source,
    tokenizer: Tokenizer,
    out: str | Path,
    config: DataConfig,
    *,
    work: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
    progress: Callable[[Progress], None] = lambda progress: None,
    shard_tokens: int = SHARD_TOKENS,
) -> Shards:
    """As `prepare`, by `config.workers` processes; the shards are the same.

    Parts of the source that are done are kept in the folder `work` (by default `OUT.work`) until `out` is complete, so
    that a preparation that failed or was killed goes on where it was. Needs twice the disk space of the shards.

    Raises:
        RequestError: as `prepare`; or another process is preparing the same.
        PolygptError: as `prepare`; or the process that had a certain part died, three times in a row; or no Ray cluster
            answers.
    """
    out = expand(out)
    _check_new(out)
    work = out.with_name(f"{out.name}.work") if work is None else work
    made = plan(source, config, _dtype(tokenizer))
    try:
        with _work_folder(work):
            write_plan(work, made, tokenizer)
            pool = Pool(work, made, tokenizer, note, progress)
            try:
                pool.run(config.workers, config.engine)
            finally:
                if 0 < len(pool.counts) < len(made.tasks):
                    note(f"data: {len(pool.counts)} of {len(made.tasks)} parts are kept in {work} for another try")
            source.tally = Tally()
            for file, tally in pool.tallies():
                source.tally.add(tally)
                source.check(file, tally)
            source.check_not_empty()
            with _new_shards(source, tokenizer, out, config, shard_tokens) as writers:
                for side, writer in writers.items():
                    for index in range(len(made.tasks)):
                        for ids in documents_of(work, index, made, side):
                            writer.add(ids, 0, 0)
                        writer.add_counts(pool.counts[index], side)
    except OSError as error:
        where = out if error.filename in (None, str(work)) else error.filename
        raise PolygptError(f"{where}: cannot be written ({error.strerror or error})") from None
    remove_folder(work)
    return open_shards(out, tokenizer)


@contextmanager
def _work_folder(work: Path) -> Iterator[None]:
    """Holds the lock of `work`; a failure removes the folder and its new parents, unless a finished part is in it."""
    from polygpt.checkpoint import folder_lock  # imports JAX, which workers do without

    missing = [folder for folder in (work, *work.parents) if not folder.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
        with folder_lock(work):
            try:
                yield
            except BaseException:
                if not any(entry.is_dir() and entry.name.isdecimal() for entry in work.iterdir()):
                    remove_folder(work)
                raise
    except BaseException:
        with suppress(OSError):  # a folder that is not empty is kept, and so are those above it
            for folder in missing:
                if folder.exists():
                    folder.rmdir()
        raise


def _check_new(out: Path) -> None:
    if out.exists():
        raise RequestError(f"{out}: exists already; choose another folder, or remove it first")


def _dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


@contextmanager
def _new_shards(
    source: Source, tokenizer: Tokenizer, out: str | Path, config: DataConfig, shard_tokens: int
) -> Iterator[dict[str, _SplitWriter]]:
    """A writer for each side; what they wrote gets its tokenizer, its manifest and its name at the end."""
    out, dtype = expand(out), _dtype(tokenizer)
    _check_new(out)
    with new_folder(out) as partial:
        with ExitStack() as stack:
            writers = {name: stack.enter_context(_SplitWriter(partial, name, dtype, shard_tokens)) for name in SPLITS}
            yield writers
            entries = {name: writer.finish(config) for name, writer in writers.items()}
        tokenizer.save(partial / TOKENIZER)
        tally, empty = source.tally, sum(writer.without_tokens for writer in writers.values())
        skipped = tally.invalid if config.invalid_utf8 == "skip" else 0
        manifest = Manifest(
            format=FORMAT,
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
            tokenizer=tokenizer.fingerprint,
            source=source.describe(),
            invalid_documents=tally.invalid,
            dropped=Dropped(empty=tally.empty, invalid=skipped, without_tokens=empty),
            **entries,
        )
        _write_manifest(partial / MANIFEST, manifest)


def _write_manifest(path: Path, manifest: Manifest) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(manifest.to_dict(), indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


class _SplitWriter(AbstractContextManager):
    """Writes the documents of one side, shard after shard; on exit it closes the current file."""

    def __init__(self, folder: Path, name: str, dtype: str, shard_tokens: int):
        self.folder, self.name, self.dtype, self.shard_tokens = folder, name, DTYPES[dtype], shard_tokens
        self.shards: list[ShardEntry] = []
        self.bytes = self.lost_bytes = self.without_tokens = 0
        self.stream = None

    def __exit__(self, *error: object) -> None:
        if self.stream is not None:
            self.stream.close()

    def add(self, ids: np.ndarray, text_bytes: int, lost_bytes: int) -> None:
        """Adds a document: its ids, and how many UTF-8 bytes of its text they stand for and how many are lost."""
        if not len(ids):  # some tokenizers encode white space to nothing
            self.without_tokens += 1
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

    def add_counts(self, counts: Counts, side: str) -> None:
        """Adds what a task counted beside its documents."""
        self.bytes += counts.bytes[side]
        self.lost_bytes += counts.lost_bytes[side]
        self.without_tokens += counts.without_tokens[side]

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
