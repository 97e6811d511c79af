"""Text that every machine has: the documentation and the standard library of the running Python."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from polygpt.data.reading import open_bytes

# Tests, demonstrations, character set tables and third-party packages: little prose, much repetition.
EXCLUDED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "turtledemo",
    "lib2to3",
    "pydoc_data",
    "ensurepip",
    "encodings",
    "__pycache__",
}


def topics() -> Iterator[tuple[str, bytes]]:
    """`topics/NAME` and the text of each topic of `help()`, sorted by name."""
    try:
        from pydoc_data import topics as module
    except ImportError:  # some distributions leave it out
        return
    for name, text in sorted(module.topics.items()):
        yield f"topics/{name}", text.encode()


def library_files() -> Iterator[tuple[str, Path]]:
    """The relative path and the file of each Python module of the standard library, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name, path in sorted(files.items()):
        folders = name.split("/")[:-1]
        if not any(folder in EXCLUDED or folder.startswith("config-") for folder in folders):
            yield name, path


def texts() -> Iterator[tuple[str, bytes]]:
    """The name and the bytes of each text: topics, then files."""
    yield from topics()
    for name, path in library_files():
        with open_bytes(path) as stream:
            data = stream.read()
        yield name, data


def describe() -> str:
    """Names the corpus in one line."""
    return f"builtin (documentation and standard library of Python {sys.version.split()[0]})"
