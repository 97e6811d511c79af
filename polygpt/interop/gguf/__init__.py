"""GGUF, llama.cpp's files, both ways."""

from polygpt.interop.gguf.reading import is_gguf, open_gguf

__all__ = ["is_gguf", "open_gguf"]
