"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from polygpt.errors import PolygptError, RequestError


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name at the end, or goes if anything goes wrong before.

    With it go the parents that had to be made: a refused request leaves nothing.

    Raises:
        PolygptError: it cannot be written.
    """
    with _appearing(folder) as partial:
        partial.mkdir()
        yield partial


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file beside `path`, to be written, that takes its name at the end; otherwise as `new_folder`.

    Raises:
        RequestError: there is something at `path` already.
        PolygptError: it cannot be written.
    """
    if path.exists():
        raise RequestError(f"{path}: exists already; choose another name")
    with _appearing(path) as partial:
        partial.touch()
        yield partial


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    missing = [parent for parent in path.parents if not parent.exists()]
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        if missing:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.rename(partial, path)
    except OSError as error:
        raise PolygptError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):  # a file; a folder is removed next
            partial.unlink(missing_ok=True)
        remove_folder(partial)
        with suppress(OSError):  # one that is not empty stays, and so do those above it
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
    """Writes the file `path` in UTF-8, in the place of the one that may be there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def remove_folder(folder: Path) -> None:
    """Removes `folder` and all in it, if it is there, and goes on trying for a second.

    Threads of a save that has failed may still be writing into it, and what they add would make one try fail.
    """
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)
