"""What a tokenizer is made from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from polygpt.config import Config, Tuple

END_OF_TEXT = "<|endoftext|>"


class TokenizerConfig(Config):
    """A tokenizer to train (`char`, `byte`, `bpe`), to read from a `file`, or the one of the `initial` model."""

    kind: Literal["char", "byte", "bpe", "file", "initial"] = "bpe"
    vocab_size: int = Field(4096, ge=1)
    """For `bpe` only, special tokens included; a text too small for it gives fewer ids."""
    path: str | None = None
    """A tokenizer.json, or a folder with one or with vocab.json and merges.txt; implies kind `file`."""
    special_tokens: Tuple[str] | None = None
    """Unset: none for `char` (tiny Shakespeare has 65 ids), `<|endoftext|>` for `byte` and `bpe`."""

    @model_validator(mode="before")
    @classmethod
    def _path_implies_file(cls, data: Any) -> Any:
        implied = isinstance(data, dict) and data.get("path") is not None and "kind" not in data
        return {**data, "kind": "file"} if implied else data

    @model_validator(mode="after")
    def _fits(self) -> TokenizerConfig:
        if self.kind == "file":
            if self.path is None:
                raise ValueError("kind 'file' needs path: a tokenizer.json, or the folder of a tokenizer")
        elif self.path is not None:
            raise ValueError(
                f"path is for kind 'file', not for kind '{self.kind}'; set kind to file, or leave path out"
            )
        if self.kind in ("file", "initial") and self.special_tokens is not None:
            raise ValueError(f"special_tokens: a tokenizer of kind '{self.kind}' has its own; leave them out")
        specials = self.specials
        if len(set(specials)) < len(specials) or "" in specials:
            raise ValueError(f"special_tokens must be distinct and not empty, not {list(specials)}")
        least = 257 + len(specials)  # every byte, the special tokens, and one merge: fewer is kind 'byte'
        if self.kind == "bpe" and self.vocab_size < least:
            raise ValueError(f"vocab_size must be at least {least} for kind 'bpe', not {self.vocab_size}")
        return self

    @property
    def specials(self) -> tuple[str, ...]:
        """The special tokens, or the kind's default."""
        if self.special_tokens is not None:
            return self.special_tokens
        return (END_OF_TEXT,) if self.kind in ("byte", "bpe") else ()
