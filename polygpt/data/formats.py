"""How each file format divides into parts, and parts into rows of one text each.

A part is a portion of a file that can be read by itself: a run of lines or of bytes, a row group, or a whole file.
The division depends on the file alone, so any number of processes prepares the same data from it.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from polygpt.data.reading import CHUNK, format_of, is_compressed, open_bytes
from polygpt.errors import RequestError

PART_BYTES = 8 << 20
PARQUET_ROWS = 256  # rows that are in memory at once
SEPARATOR = b"<|endoftext|>"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NEEDS_PYARROW = "reading .parquet needs pyarrow; install it with: pip install 'polygpt[parquet]'"


class Part(NamedTuple):
    """A portion of a file: of a parquet file the row group `start`, of any other the rows that begin in a byte range.

    Attributes:
        start, stop: the byte range, or row group; `stop` None means to the end of the file.
    """

    file: str
    start: int = 0
    stop: int | None = None


class Row(NamedTuple):
    """One text.

    Attributes:
        number: 1-based; of a parquet file's rows within the file, of others within the part (blank lines count).
        text: may be empty.
        invalid: how many sequences that are not UTF-8 became U+FFFD in it.
    """

    number: int
    text: str
    invalid: int


def parts_of(path: Path) -> list[Part]:
    """The parts of a file, in order.

    Raises:
        RequestError: it cannot be read, or is not what its suffix says.
    """
    kind, name = format_of(path), str(path)
    if kind == "parquet":
        with _parquet(path) as file:
            return [Part(name, group, group + 1) for group in range(file.num_row_groups)]
    if kind == "csv" or is_compressed(path):  # a quoted field may hold line breaks; a compressed file has no middle
        return [Part(name)]
    with open_bytes(path) as stream:
        size = stream.seek(0, io.SEEK_END)
    starts = list(range(0, size, PART_BYTES)) or [0]
    return [Part(name, start, stop) for start, stop in zip(starts, [*starts[1:], None], strict=True)]


def rows_of(part: Part, text_key: str) -> Iterator[Row]:
    """The rows of a part; blank lines and what is empty between two separators are no rows.

    Raises:
        RequestError: the part cannot be read, is malformed, or has no `text_key`.
    """
    path = Path(part.file)
    kind = format_of(path)
    if kind == "parquet":
        yield from _parquet_rows(path, part.start, text_key)
        return
    with open_bytes(path) as stream:
        if kind == "csv":
            yield from _csv_rows(stream, part.file, text_key)
            return
        found = _lines(stream, part) if kind == "jsonl" else _texts(stream, part)
        for number, data in enumerate(found, start=1):
            if number == 1 and not part.start:
                data = data.removeprefix(BYTE_ORDER_MARK)
            if kind == "jsonl" and data.strip():
                yield Row(number, *_from_json(data, f"{part_name(part)} line {number}", text_key))
            elif kind != "jsonl" and data:
                yield Row(number, *decode(data))


def part_name(part: Part) -> str:
    """The file, and the byte from which its rows are numbered, unless from the beginning."""
    whole = not part.start or format_of(Path(part.file)) == "parquet"
    return part.file if whole else f"{part.file} from byte {part.start:,}"


def decode(data: bytes) -> tuple[str, int]:
    """The text, and how many invalid byte sequences in it became U+FFFD."""
    try:
        return data.decode(), 0
    except UnicodeDecodeError:
        text = data.decode(errors="replace")
        return text, text.count(REPLACEMENT) - data.count(REPLACEMENT.encode())


def _lines(stream: BinaryIO, part: Part) -> Iterator[bytes]:
    """The lines that begin in the part."""
    position = part.start
    if part.start:  # the rest of a line that begins before the part
        stream.seek(part.start - 1)
        position += len(stream.readline()) - 1
    while part.stop is None or position < part.stop:
        line = stream.readline()
        if not line:
            return
        position += len(line)
        yield line


def _texts(stream: BinaryIO, part: Part) -> Iterator[bytes]:
    """The documents of a text file that begin in the part: the file as it is, or what is between `<|endoftext|>`.

    Newlines around a document are removed where there is a separator: they belong to its line (as in TinyStories).
    """
    position, pending, searched = part.start, bytearray(), 0  # `position` is that of pending[0]
    inside, separated = part.start == 0, False
    if part.start:  # a separator that ends at the part's start, or later, begins a document of this part
        position = max(0, position - len(SEPARATOR))
        stream.seek(position)
    while chunk := stream.read(CHUNK):
        pending += chunk
        while (found := pending.find(SEPARATOR, searched)) >= 0:
            if inside:
                yield bytes(pending[:found].strip(b"\r\n"))
            del pending[: found + len(SEPARATOR)]
            position += found + len(SEPARATOR)
            inside, separated, searched = True, True, 0
            if part.stop is not None and position >= part.stop:
                return
        searched = max(0, len(pending) - len(SEPARATOR) + 1)
        if not inside:
            del pending[:searched]
            position, searched = position + searched, 0
            if part.stop is not None and position >= part.stop:
                return
    if inside:
        yield bytes(pending.strip(b"\r\n") if separated else pending)


def _from_json(line: bytes, where: str, key: str) -> tuple[str, int]:
    """The text of a line's object, and how much in it was invalid: bytes that are not UTF-8, and lone surrogates."""
    text, invalid = decode(line)
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise RequestError(f"{where}: an object with the key '{key}' is needed, not {type(value).__name__}")
    if key not in value:
        raise RequestError(f"{where}: no key '{key}'; its keys are: {_names(value)} (set data.text_key to one)")
    if not isinstance(value[key], str):
        raise RequestError(f"{where}: '{key}' must be text, not {type(value[key]).__name__}")
    text, surrogates = re.subn("[\ud800-\udfff]", REPLACEMENT, value[key])
    return text, invalid + surrogates


def _csv_rows(stream: BinaryIO, file: str, key: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, strict=True)
    try:
        header = next(reader, [])
        if not header:
            return
        if key not in header:
            raise RequestError(
                f"{file}: no column '{key}'; its columns are: {_names(header)} (set data.text_key to one)"
            )
        column = header.index(key)
        for number, row in enumerate(reader, start=1):
            if len(row) == len(header):
                yield Row(number, *decode(row[column].encode(errors="surrogateescape")))
            elif row:
                raise RequestError(
                    f"{file}: row {number} (line {reader.line_num}) has {len(row)} fields, the header {len(header)}"
                )
    except csv.Error as error:
        raise RequestError(f"{file}: line {reader.line_num} is not CSV ({error})") from None
    finally:
        text.detach()


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """The opened parquet file."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise RequestError(f"{path}: {NEEDS_PYARROW}") from None
    if not path.is_file():
        raise RequestError(f"{path}: no such file")
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except PermissionError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    except (arrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise RequestError(f"{path}: not a whole parquet file ({reason})") from None


def _parquet_rows(path: Path, group: int, key: str) -> Iterator[Row]:
    with _parquet(path) as file:
        _check_column(path, file.schema_arrow, key)
        number = sum(file.metadata.row_group(before).num_rows for before in range(group)) + 1
        options = {"row_groups": [group], "columns": [key], "batch_size": PARQUET_ROWS, "use_threads": False}
        for batch in file.iter_batches(**options):
            # As bytes, because a column of strings may hold any bytes; a missing value is an empty text.
            for data in batch.column(0).cast("large_string").cast("large_binary").to_pylist():
                yield Row(number, *decode(data or b""))
                number += 1


def _check_column(path: Path, schema: Any, key: str) -> None:
    from pyarrow import types

    if schema.names.count(key) != 1:
        raise _no_column(str(path), schema.names, key)
    kind = schema.field(key).type
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)):
        raise RequestError(f"{path}: column '{key}' must be text, not {kind}")


def _no_column(file: str, columns: Iterable[str], key: str) -> RequestError:
    return RequestError(f"{file}: no column '{key}'; its columns are: {_names(columns)} (set data.text_key to one)")


def _names(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:8]) or "none"
