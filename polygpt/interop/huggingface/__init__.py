"""Hugging Face's folders, both ways."""

from polygpt.interop.huggingface.export import choose_family, export_huggingface
from polygpt.interop.huggingface.folder import ARCHITECTURES, is_huggingface, open_huggingface

__all__ = ["ARCHITECTURES", "choose_family", "export_huggingface", "is_huggingface", "open_huggingface"]
