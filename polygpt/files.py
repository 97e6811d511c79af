"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from polygpt.errors import PolygptError


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name at the end, or goes if anything goes wrong before.

    With it go the parents that had to be made: a refused request leaves nothing.

    Raises:
        PolygptError: it cannot be written.
    """
    missing = [parent for parent in folder.parents if not parent.exists()]
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, folder)
    except OSError as error:
        raise PolygptError(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # one that is not empty stays, and so do those above it
            for parent in missing:
                parent.rmdir()


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
