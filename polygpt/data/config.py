"""The configuration of data: what to read, how to split it, and how to cut it into windows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from polygpt.config import Config, Tuple

BUILTIN = "builtin"


class DataConfig(Config):
    """Where text comes from and how it becomes windows of tokens.

    Attributes:
        path: `builtin` (the documentation and standard library of the running Python); a .txt, .jsonl or .csv file,
            plain or compressed (.gz, .zst), or a .parquet file; a folder of these; a glob; a list of any of them; or
            one folder of prepared shards.
        text_key: the key of a .jsonl object, or the column of a .csv or .parquet file, that holds the text.
        split: `document` assigns each document to training or validation by a hash of its text; `fraction` holds out
            the end of the whole text, as nanoGPT does; `auto` is `fraction` for fewer than 100 documents.
        validation_fraction: share of the text, or of the documents, that is held out.
        stride: tokens between the starts of training windows; None is the context length, 1 is every offset.
        packing: `windows` cuts the text into windows wherever they fall; `documents` fills each window with whole
            documents as far as they fit, which do not see each other, and pads the rest. Only a document that is longer
            than a window is divided.
        invalid_utf8: text that is not UTF-8 is an error, becomes U+FFFD, or its document is left out (the last two are
            counted).
    """

    path: str | Tuple[str] = Field(BUILTIN, min_length=1)
    text_key: str = "text"
    split: Literal["document", "fraction", "auto"] = "document"
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    stride: int | None = Field(None, ge=1)
    packing: Literal["windows", "documents"] = "windows"
    invalid_utf8: Literal["refuse", "replace", "skip"] = "refuse"

    @model_validator(mode="after")
    def _stride_of_windows(self) -> DataConfig:
        if self.stride is not None and self.packing == "documents":
            raise ValueError("stride is between windows of text; leave it out with packing: documents")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a tuple of paths."""
        return (self.path,) if isinstance(self.path, str) else self.path
