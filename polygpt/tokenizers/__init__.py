"""Tokenizers: characters, bytes, byte-level BPE trained here, and any Hugging Face `tokenizer.json`.

Whatever the kind, a tokenizer is one `tokenizer.json` of the `tokenizers` library.
"""

from polygpt.tokenizers.chat import render_chat
from polygpt.tokenizers.config import END_OF_TEXT, TokenizerConfig
from polygpt.tokenizers.tokenizer import Tokenizer, load_tokenizer
from polygpt.tokenizers.train import train_tokenizer

__all__ = ["END_OF_TEXT", "Tokenizer", "TokenizerConfig", "load_tokenizer", "render_chat", "train_tokenizer"]
