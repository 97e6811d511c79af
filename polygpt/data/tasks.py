"""Preparation in tasks: each part of a source is tokenized into a folder of its own, by whatever process.

The tasks depend on the source and the settings alone, so the shards that are made of their results do not depend on how
many processes there are. A task's folder gets its name once it is complete: a preparation that was killed keeps it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from polygpt.config import validate
from polygpt.data.config import BUILTIN, DataConfig
from polygpt.data.encoding import Division, division_at, encode, is_by_document
from polygpt.data.formats import Part, part_name
from polygpt.data.shards import DTYPES, OFFSET, SPLITS
from polygpt.data.sources import Source, Tally
from polygpt.files import remove_folder, write_text
from polygpt.tokenizers import Tokenizer, load_tokenizer

PLAN, COUNTS, TOKENIZER = "plan.json", "counts.json", "tokenizer.json"
VERSION = 1  # of the files in a work folder


@dataclass(frozen=True)
class Task:
    """One part of the source.

    Attributes:
        start: the character of the whole text at which the part begins; 0 where documents are divided by a hash.
    """

    part: Part
    start: int


@dataclass(frozen=True)
class Plan:
    """All tasks of a preparation, and what they have in common."""

    config: DataConfig
    division: Division
    dtype: str
    tasks: list[Task]

    def to_json(self) -> dict[str, Any]:
        """As JSON, from which a worker reads it."""
        return {
            "version": VERSION,
            "config": self.config.without_execution().to_dict(),
            "division": asdict(self.division),
            "dtype": self.dtype,
            "tasks": [[*task.part, task.start] for task in self.tasks],
        }

    @classmethod
    def of_json(cls, data: dict[str, Any]) -> Plan:
        """The opposite of `to_json`."""
        tasks = [Task(Part(*part), start) for *part, start in data["tasks"]]
        config = validate(DataConfig, data["config"])
        return cls(config, Division(**data["division"]), data["dtype"], tasks)


@dataclass
class Counts:
    """What came of a task: tokens, documents and bytes of each side, and the tally of its part."""

    tokens: dict[str, int]
    documents: dict[str, int]
    bytes: dict[str, int]
    lost_bytes: dict[str, int]
    without_tokens: dict[str, int]
    tally: dict[str, int]


def plan(source: Source, config: DataConfig, dtype: str) -> Plan:
    """The tasks of `source`. Unless documents are divided by a hash, all of its text is read once to measure it.

    Raises:
        RequestError: a file cannot be read, or is not what its suffix says.
    """
    if is_by_document(source, config):
        division, tasks = Division(config.validation_fraction), [Task(part, 0) for part in source.parts()]
    else:
        start, tasks = 0, []
        for part in source.parts():
            tasks.append(Task(part, start))
            start += sum(len(document.text) for document in source.read(part, Tally()))
        division = division_at(start, config)
    return Plan(config, division, dtype, tasks)


def write_plan(work: Path, made: Plan, tokenizer: Tokenizer) -> None:
    """Writes the plan into the work folder, which is emptied first if it is of another plan, source or tokenizer."""
    files = {task.part.file for task in made.tasks if task.part.file != BUILTIN}
    stamps = {file: [os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in sorted(files)}
    text = json.dumps(made.to_json() | {"files": stamps, "tokenizer": tokenizer.fingerprint}, sort_keys=True)
    path = work / PLAN
    for partial in work.glob(".*.*"):  # of processes that were killed
        remove_folder(partial)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        for folder in [entry for entry in work.iterdir() if entry.is_dir()]:
            remove_folder(folder)
        tokenizer.save(work / TOKENIZER)
        write_text(path, text)


def read_plan(work: Path, batch_chars: int) -> tuple[Plan, Tokenizer]:
    """The plan in the work folder, to be carried out with so many characters at a time, and its tokenizer."""
    made = Plan.of_json(json.loads((work / PLAN).read_text(encoding="utf-8")))
    config = made.config.model_copy(update={"batch_chars": batch_chars})
    return replace(made, config=config), load_tokenizer(work / TOKENIZER)


def task_folder(work: Path, index: int) -> Path:
    """Where the results of a task are, once it is done."""
    return work / f"{index:06d}"


def run_task(work: Path, index: int, made: Plan, tokenizer: Tokenizer) -> Counts:
    """Tokenizes one part into its folder.

    Raises:
        RequestError: the part cannot be read or encoded.
        OSError: the folder cannot be written; what was written is removed.
    """
    partial = work / f".{index:06d}.{secrets.token_hex(4)}"  # processes of several machines may have one number
    try:
        partial.mkdir()
        counts = _write_part(partial, made, index, tokenizer)
        try:
            os.rename(partial, task_folder(work, index))
        except OSError:
            if finished(work, index, made) is None:  # a worker that outlived the one before this process may have it
                raise
        return counts
    finally:
        remove_folder(partial)


def _write_part(partial: Path, made: Plan, index: int, tokenizer: Tokenizer) -> Counts:
    task, tally = made.tasks[index], Tally()
    counts = Counts(*(dict.fromkeys(SPLITS, 0) for _ in range(5)), tally={})
    documents = Source(made.config, (task.part.file,)).read(task.part, tally)
    with ExitStack() as stack:
        streams = {
            (side, kind): stack.enter_context((partial / f"{side}.{kind}").open("wb"))
            for side in SPLITS
            for kind in ("tokens", "lengths")
        }
        for found in encode(made.division.pieces(documents, task.start), tokenizer, made.config.batch_chars):
            if len(found.ids):  # some tokenizers encode white space to nothing
                streams[found.side, "tokens"].write(found.ids.astype(DTYPES[made.dtype]).tobytes())
                streams[found.side, "lengths"].write(np.array(len(found.ids), OFFSET).tobytes())
                for name, count in (("tokens", len(found.ids)), ("documents", 1), ("bytes", found.bytes)):
                    getattr(counts, name)[found.side] += count
                counts.lost_bytes[found.side] += found.lost_bytes
            else:
                counts.without_tokens[found.side] += 1
    counts.tally = vars(tally)
    (partial / COUNTS).write_text(json.dumps(asdict(counts)), encoding="utf-8")
    return counts


def finished(work: Path, index: int, made: Plan) -> Counts | None:
    """What came of a task; None, and its folder is removed, if it is not done or not whole."""
    folder = task_folder(work, index)
    with suppress(OSError, ValueError, TypeError):
        counts = Counts(**json.loads((folder / COUNTS).read_text(encoding="utf-8")))
        sizes = {"tokens": DTYPES[made.dtype].itemsize, "documents": OFFSET.itemsize}
        names = {"tokens": "tokens", "documents": "lengths"}
        if all(
            (folder / f"{side}.{names[what]}").stat().st_size == getattr(counts, what)[side] * size
            for side in SPLITS
            for what, size in sizes.items()
        ):
            return counts
    remove_folder(folder)
    return None


def documents_of(work: Path, index: int, made: Plan, side: str) -> Iterator[np.ndarray]:
    """The ids of each document (or piece) of a finished task on one side, in order."""
    folder = task_folder(work, index)
    lengths = np.fromfile(folder / f"{side}.lengths", OFFSET)
    with (folder / f"{side}.tokens").open("rb") as stream:
        dtype = DTYPES[made.dtype]
        for length in lengths.tolist():
            yield np.frombuffer(stream.read(length * dtype.itemsize), dtype)


def describe(part: Part) -> str:
    """Names a part for a message: the file, and which portion of it."""
    if part.file.lower().endswith(".parquet"):
        return f"{part.file}, row group {part.start}"
    return part_name(part)
