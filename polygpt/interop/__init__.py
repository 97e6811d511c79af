"""Checkpoints of other people's, in and out. Name maps live here; the model knows nothing of them."""

from polygpt.interop.checkpoint import ForeignModel
from polygpt.interop.huggingface import export_huggingface, is_huggingface, open_huggingface

__all__ = ["ForeignModel", "export_huggingface", "is_huggingface", "open_huggingface"]
