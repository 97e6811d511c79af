"""Checkpoints of other people's, in and out. Name maps live here; the model knows nothing of them."""

from polygpt.interop.checkpoint import ForeignModel
from polygpt.interop.huggingface import HUB, export_huggingface, fetch, is_huggingface, open_huggingface
from polygpt.interop.settings import read_json

__all__ = [
    "HUB",
    "ForeignModel",
    "export_huggingface",
    "fetch",
    "is_huggingface",
    "open_huggingface",
    "read_json",
]
