"""Files as bytes, plain or compressed, and the format that a file's name implies."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import zstandard

from polygpt.errors import PolygptError, RequestError

CHUNK = 1 << 20
GZIP = b"\x1f\x8b"
COMPRESSED = (".gz", ".zst")
FORMATS = {".txt": "text", ".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
SUFFIXES = (*FORMATS, *COMPRESSED, *(f"{s}{c}" for s in FORMATS if s != ".parquet" for c in COMPRESSED))

Format = Literal["text", "jsonl", "csv", "parquet"]


def format_of(path: Path) -> Format | None:
    """The format that the file's name implies (a bare .gz or .zst is text); None for any other name."""
    suffix = path.suffix.lower()
    if is_compressed(path):
        suffix = Path(path.stem).suffix.lower() or ".txt"
        if suffix == ".parquet":  # compresses its own pages, and must be read from its end
            return None
    return FORMATS.get(suffix)


def is_compressed(path: Path) -> bool:
    """Whether the file's name says that it is compressed as a whole."""
    return path.suffix.lower() in COMPRESSED


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The bytes of `path`, decompressed.

    Raises:
        RequestError: the file is missing, cannot be read, or is not in the format of its suffix.
    """
    try:
        with path.open("rb") as raw:
            if path.suffix.lower() == ".gz":
                yield io.BufferedReader(_Decompressed(raw, lambda: zlib.decompressobj(wbits=31), GZIP), CHUNK)
            elif path.suffix.lower() == ".zst":
                yield io.BufferedReader(_Decompressed(raw, zstandard.ZstdDecompressor().decompressobj), CHUNK)
            else:
                yield raw
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        kind = "gzip" if path.suffix.lower() == ".gz" else "zstd"
        raise RequestError(f"{path}: not a whole {kind} file ({error})") from None
    except PermissionError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except OSError as error:
        raise PolygptError(f"{path}: reading failed ({error.strerror})") from None


class _Decompressed(io.RawIOBase):
    """A compressed stream of one or more frames; a truncated one is an error (`zstandard`'s own reader accepts it).

    `magic` is what every frame begins with: other bytes after a frame are then ignored, as gzip(1) does (a signature,
    say). Zeros between frames are padding.
    """

    def __init__(self, raw: BinaryIO, new_frame: Callable[[], Any], magic: bytes = b""):
        self.raw, self.new_frame, self.magic = raw, new_frame, magic
        self.frame = new_frame()
        self.pending = memoryview(b"")
        self.within = False  # inside a frame

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self.pending:
            chunk = self.frame.unused_data or self.raw.read(1 << 16)
            if self.frame.eof:
                chunk = self._after_padding(chunk)
                if not chunk.startswith(self.magic):
                    return 0
                self.frame = self.new_frame()
            if not chunk:
                if self.within:
                    raise EOFError("it ends in the middle")
                return 0
            self.pending = memoryview(self.frame.decompress(chunk))
            self.within = not self.frame.eof
        count = min(len(buffer), len(self.pending))
        buffer[:count], self.pending = self.pending[:count], self.pending[count:]
        return count

    def _after_padding(self, chunk: bytes) -> bytes:
        """`chunk` and what follows it, as far as it takes to tell whether another frame begins behind the zeros."""
        while self.magic and len(chunk := chunk.lstrip(b"\0")) < len(self.magic):
            more = self.raw.read(1 << 16)
            if not more:
                break
            chunk += more
        return chunk
