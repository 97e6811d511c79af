"""A Hugging Face folder with a tokenizer, as a user would have it."""

import shutil
from pathlib import Path

from make_references import REFERENCES

from polygpt.tokenizers import TokenizerConfig, train_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?'-:\nROMEABCDFGHIJKL"  # 50 characters, as many as the references have ids


def with_tokenizer(folder: Path, reference: str = "llama") -> Path:
    """A copy of a reference in `folder`, with a tokenizer of characters."""
    shutil.copytree(REFERENCES / reference, folder)
    train_tokenizer(TokenizerConfig(kind="char"), [LETTERS]).save(folder / "tokenizer.json")
    return folder
