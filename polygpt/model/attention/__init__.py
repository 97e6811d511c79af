"""Attention: one file for each kind, and the registry of kinds."""

from polygpt.model.attention.linear import LinearAttentionConfig
from polygpt.model.attention.local import LocalAttentionConfig
from polygpt.model.attention.softmax import SoftmaxAttentionConfig
from polygpt.model.parts import AttentionConfig

MENU: dict[str, type[AttentionConfig]] = {
    "softmax": SoftmaxAttentionConfig,
    "local": LocalAttentionConfig,
    "linear": LinearAttentionConfig,
}

__all__ = ["MENU", "LinearAttentionConfig", "LocalAttentionConfig", "SoftmaxAttentionConfig"]
