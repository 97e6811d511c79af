"""Tokenizers: characters, bytes, byte-level BPE trained here, and any Hugging Face `tokenizer.json`.

Whatever the kind, a tokenizer is one `tokenizer.json` of the `tokenizers` library.
"""

from polygpt.tokenizers.chat import Messages, Tools, chat_tokens, render_chat
from polygpt.tokenizers.config import END_OF_TEXT, TokenizerConfig, implied_kind
from polygpt.tokenizers.folder import has_tokenizer, load_tokenizer
from polygpt.tokenizers.gguf_reading import read_gguf_text
from polygpt.tokenizers.gguf_writing import write_gguf_text
from polygpt.tokenizers.sentencepiece import SPACE, PieceKind, score_bpe
from polygpt.tokenizers.tokenizer import Tokenizer
from polygpt.tokenizers.train import first_bytes, train_tokenizer

__all__ = [
    "END_OF_TEXT",
    "SPACE",
    "Messages",
    "PieceKind",
    "Tokenizer",
    "TokenizerConfig",
    "Tools",
    "chat_tokens",
    "first_bytes",
    "has_tokenizer",
    "implied_kind",
    "load_tokenizer",
    "read_gguf_text",
    "render_chat",
    "score_bpe",
    "train_tokenizer",
    "write_gguf_text",
]
