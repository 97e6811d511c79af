"""Attention: a file a kind; this is the menu."""

from polygpt.model.attention.softmax import SoftmaxAttentionConfig
from polygpt.model.parts import AttentionConfig

MENU: dict[str, type[AttentionConfig]] = {"softmax": SoftmaxAttentionConfig}

__all__ = ["MENU", "SoftmaxAttentionConfig"]
