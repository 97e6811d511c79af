"""GGUF, the files of llama.cpp: import and export."""

from polygpt.interop.gguf.export import choose_architecture, export_gguf
from polygpt.interop.gguf.reading import is_gguf, open_gguf

__all__ = ["choose_architecture", "export_gguf", "is_gguf", "open_gguf"]
