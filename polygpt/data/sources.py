"""Sources: documents from files, folders, globs or the built-in corpus, in a stable order."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from polygpt.data import builtin, hub
from polygpt.data.catalogue import DATASETS
from polygpt.data.config import BUILTIN, DataConfig
from polygpt.data.formats import Part, part_name, parts_of, rows_of
from polygpt.data.reading import SUFFIXES, format_of
from polygpt.errors import RequestError, suggest
from polygpt.files import expand
from polygpt.hub import PREFIX


class Document(NamedTuple):
    """A text and its source: `FILE:N` for the N-th row or part of a file, or the name of a built-in text."""

    name: str
    text: str


@dataclass
class Tally:
    """What was read: `documents` that are not empty, and what was left out or replaced.

    Attributes:
        documents: texts that were found, invalid ones included.
        empty: rows without text.
        invalid: documents that contained bytes that are not UTF-8, and `sequences` of such bytes.
    """

    documents: int = 0
    empty: int = 0
    invalid: int = 0
    sequences: int = 0

    def add(self, other: Tally) -> None:
        """Adds another tally's counts."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)


class Source:
    """Documents; can be iterated any number of times. Empty documents and blank lines are left out.

    Attributes:
        tally: of the last iteration.
    """

    def __init__(self, config: DataConfig, files: tuple[str | Path, ...]):
        """`files` are paths or the word `builtin`, found by `open_source`."""
        self.config = config
        self.files = files
        self.tally = Tally()

    def describe(self) -> str:
        """Names the files in one line."""
        names = [builtin.describe() if file == BUILTIN else str(file) for file in self.files]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more files" if len(names) > 3 else "")

    def parts(self) -> Iterator[Part]:
        """Portions that can be read by themselves, in order. They depend on the files alone.

        Raises:
            RequestError: a file cannot be read, or is not what its suffix says.
        """
        for file in self.files:
            if file == BUILTIN:
                yield Part(BUILTIN)
            else:
                for path in hub.fetched(str(file)) if _is_remote(file) else [Path(file)]:
                    yield from parts_of(path)

    def __iter__(self) -> Iterator[Document]:
        """Yields each document.

        Raises:
            RequestError: a file is not in the format of its suffix, is not UTF-8 (if that is refused), or no file has
                any text.
        """
        self.tally = Tally()
        for file, parts in groupby(self.parts(), lambda part: part.file):
            tally = Tally()  # of this file
            for part in parts:
                yield from self.read(part, tally)
            self.tally.add(tally)
            self.check(file, tally)
        self.check_not_empty()

    def read(self, part: Part, tally: Tally) -> Iterator[Document]:
        """The documents of one part; adds what it finds to `tally`.

        Of invalid documents, if they are refused, all are counted, but neither they nor later ones are yielded.

        Raises:
            RequestError: the part is not in the format of its file's suffix.
        """
        if part.file == BUILTIN:
            for name, data in builtin.texts():
                tally.documents += 1
                yield Document(name, data.decode(errors="replace"))  # a few old modules are Latin-1
            return
        policy, name = self.config.invalid_utf8, part_name(part)
        for number, text, sequences in rows_of(part, self.config.text_key):
            if not text:
                tally.empty += 1
                continue
            tally.documents += 1
            tally.invalid += sequences > 0
            tally.sequences += sequences
            if (sequences and policy == "skip") or (tally.invalid and policy == "refuse"):
                continue
            yield Document(f"{name}:{number}", text)

    def check(self, file: str, tally: Tally) -> None:
        """Refuses a file that is not UTF-8, unless `invalid_utf8` says otherwise; `tally` is of the whole file."""
        if tally.invalid and self.config.invalid_utf8 == "refuse":
            raise RequestError(
                f"{file}: {tally.invalid} of {tally.documents} documents are not UTF-8 ({tally.sequences} sequences);\n"
                "convert the file, or set data.invalid_utf8 to 'replace' (U+FFFD) or 'skip' (leave them out)"
            )

    def check_not_empty(self) -> None:
        """Refuses a source without any text, after it was read."""
        skipped = self.tally.invalid if self.config.invalid_utf8 == "skip" else 0
        if self.tally.documents == skipped:
            hint = f" ({skipped} documents were skipped)" if skipped else ""
            raise RequestError(f"{self.describe()}: no text in it{hint}")


def open_source(config: DataConfig) -> Source:
    """The documents that `config.path` names. Local files are found now, and read during iteration.

    A file or folder has precedence over a data set of the same name (`polygpt data list`). Files on a hub are found and
    downloaded during iteration.

    Raises:
        RequestError: a path is missing, a glob matches nothing, or a file's suffix is not one that is read.
    """
    files = [file for path in config.paths for file in _files(path)]
    return Source(config, tuple(dict.fromkeys(files)))  # a file that two globs match is read once


def _is_remote(file: str | Path) -> bool:
    return isinstance(file, str) and file.startswith(PREFIX)


def _not_found(path: str) -> RequestError:
    known = [BUILTIN, *DATASETS]
    near = suggest(path, known) if "/" not in path and "." not in path else ""
    hint = (
        near
        if "did you mean" in near
        else "data.path is a file, a folder, a glob, 'builtin', or a name of: polygpt data list"
    )
    return RequestError(f"{path}: no such file; {hint}")


def _files(path: str) -> list[str | Path]:
    if path == BUILTIN:
        return [BUILTIN]
    found = expand(path)
    if path.startswith(PREFIX) and not found.exists():
        hub.check_name(path)
        return [path]
    if path in DATASETS and not found.exists():
        dataset = DATASETS[path]
        if not dataset.is_read:
            raise RequestError(f"{path}: download it from {dataset.where} first, and give data.path=FILE")
        return [dataset.where]
    if found.is_dir():
        return _folder(found)
    if not found.exists() and glob.has_magic(path):
        matches = [Path(name) for name in sorted(glob.glob(str(found), recursive=True))]
        files = [match for match in matches if match.is_file()]
        if not files:
            raise RequestError(f"{path}: no file matches")
    else:
        files = [found]
    for file in files:
        if not file.exists():
            raise _not_found(path)
        if not file.is_file():
            raise RequestError(f"{path}: not a regular file")
        if format_of(file) is None:
            hint = f" (if it is plain text, rename it to {file.stem}.txt)"
            raise RequestError(f"{file}: unknown kind of file; its name must end in {', '.join(SUFFIXES)}{hint}")
    return files


def _folder(folder: Path) -> list[str | Path]:
    if (folder / "manifest.json").is_file():
        raise RequestError(f"{folder}: contains prepared shards, which cannot be read as text or mixed with it")
    visible = (p for p in folder.rglob("*") if not any(s.startswith(".") for s in p.relative_to(folder).parts))
    files = sorted(path for path in visible if path.is_file() and format_of(path))
    if not files:
        raise RequestError(f"{folder}: no file in it ends in {', '.join(SUFFIXES)}")
    return files
