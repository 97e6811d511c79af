"""What to read, how to divide it, and how to cut it into windows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polygpt.config import Config, Tuple

BUILTIN = "builtin"


class DataConfig(Config):
    """Where text comes from and how it becomes windows of tokens."""

    path: str | Tuple[str] = Field(BUILTIN, min_length=1)
    """`builtin` (the documentation and standard library of the Python that runs), a file (.txt or .jsonl,
    with .gz or .zst after it or not), a folder of these, a glob, a list of any; or one folder of prepared
    shards."""
    text_key: str = "text"
    """The key of a .jsonl object that holds the text."""
    split: Literal["document", "fraction", "auto"] = "document"
    """`document`: each document goes to one side by a hash of its text. `fraction`: the last characters of
    the whole text are for validation, as nanoGPT does. `auto`: `fraction` if there are fewer than 100 documents."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    stride: int | None = Field(None, ge=1)
    """Tokens between the starts of training windows; None is the context length; 1 is every offset."""
    invalid_utf8: Literal["refuse", "replace", "skip"] = "refuse"
    """Text that is not UTF-8: an error, U+FFFD in its place, or the document left out (both counted)."""

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a tuple."""
        return (self.path,) if isinstance(self.path, str) else self.path
