"""Attention: one file for each kind, and the registry of kinds."""

from polygpt.model.attention.linear import LinearAttentionConfig
from polygpt.model.attention.local import LocalAttentionConfig
from polygpt.model.attention.softmax import SoftmaxAttentionConfig
from polygpt.model.parts import AttentionConfig

REGISTRY: dict[str, type[AttentionConfig]] = {
    "softmax": SoftmaxAttentionConfig,
    "local": LocalAttentionConfig,
    "linear": LinearAttentionConfig,
}

__all__ = ["REGISTRY", "LinearAttentionConfig", "LocalAttentionConfig", "SoftmaxAttentionConfig"]
