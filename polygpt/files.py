"""Atomic files and folders: written beside their final place and renamed once they are complete."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from polygpt.errors import PolygptError, RequestError


def expand(path: str | os.PathLike) -> Path:
    """`path` with `~` as the home folder; where there is no such home, `~name` is a file's own name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no user of that name
        return Path(path)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling of `folder`: renamed to `folder` on success, removed on failure.

    On failure the parents that had to be created are removed, too.

    Raises:
        PolygptError: it cannot be written.
    """
    with _temporary(folder) as partial:
        partial.mkdir()
        yield partial


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary sibling of the file `path`, handled as in `new_folder`.

    Raises:
        RequestError: `path` exists already.
        PolygptError: it cannot be written.
    """
    if path.exists():
        raise RequestError(f"{path}: exists already; choose another name")
    with _temporary(path) as partial:
        partial.touch()
        yield partial


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    missing = [parent for parent in path.parents if not parent.exists()]
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        if missing:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.rename(partial, path)
    except OSError as error:
        raise PolygptError(f"{path}: cannot be written ({error.strerror or error})") from None
    except PolygptError as error:  # about a file in it, which is named as it would have been
        error.args = (str(error).replace(str(partial), str(path)),)
        raise
    finally:
        with suppress(OSError):  # if it is a file; a folder is removed next
            partial.unlink(missing_ok=True)
        remove_folder(partial)
        with suppress(OSError):  # a parent that is not empty is kept, and so are those above it
            for parent in missing:
                parent.rmdir()


def check_checkpoint_path(folder: Path) -> None:
    """Refuses a path at which no checkpoint could be written later.

    Raises:
        RequestError: it is not UTF-8, which the library that writes checkpoints (TensorStore) needs.
    """
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise RequestError(
            f"{folder}: not UTF-8, so no checkpoint can be written there; choose another --out"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Writes the file `path` in UTF-8, replacing an existing one atomically.

    Raises:
        OSError: it cannot be written; it names `path`, and nothing is left beside it.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes the file `path`, as `write_text` does."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        error.filename, error.filename2 = str(path), None
        raise


def remove_folder(folder: Path, settle: float = 0.0) -> None:
    """Removes `folder` and everything in it if it exists, retrying for a second.

    The threads of a failed save may still be writing into it, which makes a single attempt fail, and may create it
    again: with `settle` it must have been gone for this many seconds.
    """
    gone = 0.0
    for _ in range(20 + round(settle / 0.05)):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            if gone >= settle:
                return
            gone += 0.05
        else:
            gone = 0.0
        time.sleep(0.05)
