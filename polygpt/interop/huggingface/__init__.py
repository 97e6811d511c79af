"""Hugging Face folders: import and export."""

from polygpt.interop.huggingface.download import fetch
from polygpt.interop.huggingface.export import choose_family, export_huggingface
from polygpt.interop.huggingface.folder import ARCHITECTURES, is_huggingface, open_huggingface

__all__ = [
    "ARCHITECTURES",
    "choose_family",
    "export_huggingface",
    "fetch",
    "is_huggingface",
    "open_huggingface",
]
