"""Text that is always there: the documentation and the standard library of the Python that runs."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Tests, demonstrations, tables of character sets and other people's packages: little prose, much repetition.
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
    """`topics/NAME` and the text of each topic that `help()` knows, by name."""
    try:
        from pydoc_data import topics as module
    except ImportError:  # some distributions leave it out
        return
    for name, text in sorted(module.topics.items()):
        yield f"topics/{name}", text.encode()


def library_files() -> Iterator[tuple[str, Path]]:
    """The path within the standard library, and the file, of each module in Python, by that path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name, path in sorted(files.items()):
        folders = name.split("/")[:-1]
        if not any(folder in EXCLUDED or folder.startswith("config-") for folder in folders):
            yield name, path


def describe() -> str:
    """One line."""
    return f"builtin (documentation and standard library of Python {sys.version.split()[0]})"
