"""Hugging Face folders: import and export."""

from polygpt.interop.huggingface.export import choose_family, export_huggingface
from polygpt.interop.huggingface.folder import ARCHITECTURES, is_huggingface, open_huggingface
from polygpt.interop.huggingface.hub import PREFIX as HUB
from polygpt.interop.huggingface.hub import fetch

__all__ = [
    "ARCHITECTURES",
    "HUB",
    "choose_family",
    "export_huggingface",
    "fetch",
    "is_huggingface",
    "open_huggingface",
]
