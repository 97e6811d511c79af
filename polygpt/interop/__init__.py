"""Import and export of foreign checkpoints. Only this package knows foreign names; the model does not."""

from polygpt.interop.gguf import choose_architecture, export_gguf, is_gguf, open_gguf
from polygpt.interop.huggingface import choose_family, export_huggingface, fetch, is_huggingface, open_huggingface
from polygpt.interop.llama2c import open_llama2c
from polygpt.interop.stored import StoredModel

__all__ = [
    "StoredModel",
    "choose_architecture",
    "choose_family",
    "export_gguf",
    "export_huggingface",
    "fetch",
    "is_gguf",
    "is_huggingface",
    "open_gguf",
    "open_huggingface",
    "open_llama2c",
]
