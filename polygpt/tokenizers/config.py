"""What a tokenizer is made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from polygpt.config import Config, Tuple, as_yaml
from polygpt.hub import PREFIX, is_name

END_OF_TEXT = "<|endoftext|>"
# Kinds that are read, and the setting that says from where.
_PLACES = {"file": "path", "hf": "name"}
_MEANINGS = {
    "path": "path: a tokenizer.json, or the folder of a tokenizer",
    "name": "name: owner/name on the Hugging Face hub",
}


def implied_kind(fields: Mapping[str, Any]) -> str | None:
    """The kind of a tokenizer that is named by its place alone; None if `fields` have a kind, or no place."""
    named = (kind for kind, key in _PLACES.items() if as_yaml(fields.get(key)) is not None)
    return None if "kind" in fields else next(named, None)


class TokenizerConfig(Config):
    """A tokenizer to train (`char`, `byte`, `bpe`), to read from a `file` or from the hub (`hf`), or that of the
    `initial` model."""

    kind: Literal["char", "byte", "bpe", "file", "hf", "initial"] = "bpe"
    vocab_size: int = Field(4096, ge=1)
    """For `bpe` only, special tokens included; a text too small for it gives fewer ids."""
    train_bytes: int = Field(1 << 28, ge=1)
    """For `bpe` only: it is trained on the first so many bytes (UTF-8) of the training text; of a mixture, on an equal
    share of them from each source. Its memory grows with the number of different words in them."""
    path: str | None = None
    """A tokenizer.json, or a folder with one or with vocab.json and merges.txt; implies kind `file`."""
    name: str | None = None
    """`owner/name` or `owner/name@revision` on the Hugging Face hub; implies kind `hf`."""
    special_tokens: Tuple[str] | None = None
    """Unset: none for `char` (tiny Shakespeare has 65 ids), `<|endoftext|>` for `byte` and `bpe`."""

    @model_validator(mode="before")
    @classmethod
    def _implied_kind(cls, data: Any) -> Any:
        kind = implied_kind(data) if isinstance(data, dict) else None
        return data if kind is None else {**data, "kind": kind}

    @model_validator(mode="after")
    def _fits(self) -> TokenizerConfig:
        for kind, key in _PLACES.items():
            given = getattr(self, key) is not None
            if self.kind == kind and not given:
                raise ValueError(f"kind '{kind}' needs {_MEANINGS[key]}")
            if given and self.kind != kind:
                raise ValueError(
                    f"{key} is for kind '{kind}', not for kind '{self.kind}'; set kind to {kind}, or leave {key} out"
                )
        if self.kind == "hf" and not is_name(self.name):
            raise ValueError(f"name must be owner/name or owner/name@revision on the hub, not '{self.name}'")
        if self.kind in ("file", "hf", "initial") and self.special_tokens is not None:
            raise ValueError(f"special_tokens: a tokenizer of kind '{self.kind}' has its own; leave them out")
        specials = self.specials
        if len(set(specials)) < len(specials) or "" in specials:
            raise ValueError(f"special_tokens must be distinct and not empty, not {list(specials)}")
        least = 257 + len(specials)  # every byte, the special tokens, and one merge: fewer is kind 'byte'
        if self.kind == "bpe" and self.vocab_size < least:
            raise ValueError(f"vocab_size must be at least {least} for kind 'bpe', not {self.vocab_size}")
        return self

    @property
    def place(self) -> str | None:
        """What `load_tokenizer` reads; None for a tokenizer that is trained, or that of the initial model."""
        return PREFIX + self.name if self.kind == "hf" else self.path

    @property
    def specials(self) -> tuple[str, ...]:
        """The special tokens, or the kind's default."""
        if self.special_tokens is not None:
            return self.special_tokens
        return (END_OF_TEXT,) if self.kind in ("byte", "bpe") else ()
