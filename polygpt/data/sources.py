"""Sources: documents from files, folders, globs or the built-in corpus, in a stable order."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from polygpt.data import builtin
from polygpt.data.config import BUILTIN, DataConfig
from polygpt.data.reading import SUFFIXES, format_of, open_bytes, text_documents
from polygpt.errors import RequestError
from polygpt.files import expand

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """A text and its source: `FILE:N` for the N-th line or part of a file, or the name of a built-in text."""

    name: str
    text: str


@dataclass
class InvalidText:
    """How much text was not UTF-8: documents that contained some, and invalid sequences in them."""

    documents: int = 0
    sequences: int = 0


class Source:
    """Documents; can be iterated any number of times. Empty documents and blank lines are left out.

    Attributes:
        invalid: what the last iteration replaced or skipped.
    """

    def __init__(self, config: DataConfig, files: tuple[str | Path, ...]):
        """`files` are paths or the word `builtin`, found by `open_source`."""
        self.config = config
        self.files = files
        self.invalid = InvalidText()

    def describe(self) -> str:
        """Names the files in one line."""
        names = [builtin.describe() if file == BUILTIN else str(file) for file in self.files]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more files" if len(names) > 3 else "")

    def __iter__(self) -> Iterator[Document]:
        """Yields each document.

        Raises:
            RequestError: a file is not in the format of its suffix, is not UTF-8 (if that is refused), or no file has
                any text.
        """
        self.invalid = InvalidText()
        empty = True
        for file in self.files:
            for document in self._builtin() if file == BUILTIN else self._file(Path(file)):
                if document.text:
                    empty = False
                    yield document
        if empty:
            skipped = f" ({self.invalid.documents} documents were skipped)" if self.invalid.documents else ""
            raise RequestError(f"{self.describe()}: no text in it{skipped}")

    def _builtin(self) -> Iterator[Document]:
        for name, data in builtin.topics():
            yield Document(name, data.decode())
        for name, path in builtin.library_files():
            with open_bytes(path) as stream:
                data = stream.read()
            yield Document(name, data.decode(errors="replace"))  # a few old modules are Latin-1

    def _file(self, path: Path) -> Iterator[Document]:
        policy = self.config.invalid_utf8
        bad, seen = InvalidText(), 0  # of this file
        for number, text, sequences in self._texts(path):
            seen += 1
            if sequences:
                for counts in (bad, self.invalid):
                    counts.documents += 1
                    counts.sequences += sequences
                if policy == "skip":
                    continue
            if not (bad.documents and policy == "refuse"):  # an invalid file is read to the end, to count all of it
                yield Document(f"{path}:{number}", text)
        if bad.documents and policy == "refuse":
            raise RequestError(
                f"{path}: {bad.documents} of {seen} documents are not UTF-8 ({bad.sequences} sequences);\n"
                "convert the file, or set data.invalid_utf8 to 'replace' (U+FFFD) or 'skip' (leave them out)"
            )

    def _texts(self, path: Path) -> Iterator[tuple[int, str, int]]:
        """The number of each non-empty text, the text, and how many sequences in it became U+FFFD."""
        is_json = format_of(path) == "jsonl"
        with open_bytes(path) as stream:
            for number, data in enumerate(stream if is_json else text_documents(stream), start=1):
                text, sequences = _decode(data.removeprefix(BYTE_ORDER_MARK) if number == 1 else data)
                if is_json and text.strip():
                    text, surrogates = self._from_json(text, f"{path} line {number}")
                    sequences += surrogates
                elif is_json:
                    continue  # a blank line
                if text:
                    yield number, text, sequences

    def _from_json(self, line: str, where: str) -> tuple[str, int]:
        """The text of a line's object, and how many lone surrogates in it became U+FFFD."""
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where}: not JSON ({error})") from None
        key = self.config.text_key
        if not isinstance(value, dict):
            raise RequestError(f"{where}: an object with the key '{key}' is needed, not {type(value).__name__}")
        if key not in value:
            keys = ", ".join(list(value)[:8]) or "none"
            raise RequestError(f"{where}: no key '{key}'; its keys are: {keys} (set data.text_key to one)")
        if not isinstance(value[key], str):
            raise RequestError(f"{where}: '{key}' must be text, not {type(value[key]).__name__}")
        return re.subn("[\ud800-\udfff]", REPLACEMENT, value[key])


def _decode(data: bytes) -> tuple[str, int]:
    """The text, and how many invalid byte sequences in it became U+FFFD."""
    try:
        return data.decode(), 0
    except UnicodeDecodeError:
        text = data.decode(errors="replace")
        return text, text.count(REPLACEMENT) - data.count(REPLACEMENT.encode())


def open_source(config: DataConfig) -> Source:
    """The documents that `config.path` names. Files are found now, and read during iteration.

    Raises:
        RequestError: a path is missing, a glob matches nothing, or a file's suffix is not one that is read.
    """
    files = [file for path in config.paths for file in _files(path)]
    return Source(config, tuple(dict.fromkeys(files)))  # a file that two globs match is read once


def _files(path: str) -> list[str | Path]:
    if path == BUILTIN:
        return [BUILTIN]
    found = expand(path)
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
            raise RequestError(f"{path}: no such file; data.path is a file, a folder, a glob or 'builtin'")
        if not file.is_file():
            raise RequestError(f"{path}: not a regular file")
        if format_of(file) is None:
            raise RequestError(f"{file}: unknown kind of file; its name must end in {', '.join(SUFFIXES)}")
    return files


def _folder(folder: Path) -> list[str | Path]:
    if (folder / "manifest.json").is_file():
        raise RequestError(f"{folder}: contains prepared shards, which cannot be read as text or mixed with it")
    visible = (p for p in folder.rglob("*") if not any(s.startswith(".") for s in p.relative_to(folder).parts))
    files = sorted(path for path in visible if path.is_file() and format_of(path))
    if not files:
        raise RequestError(f"{folder}: no file in it ends in {', '.join(SUFFIXES)}")
    return files
