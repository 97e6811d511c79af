"""GPT-2 in its four published sizes (Radford et al. 2019)."""

from __future__ import annotations

from typing import Any

from polygpt.config import merge
from polygpt.presets.core import gpt


def gpt2() -> dict[str, Any]:
    """124M: 12 layers, embed_dim 768."""
    return merge(gpt(), {"vocab_size": 50257, "compute_dtype": "bfloat16"})


def _sized(num_layers: int, num_heads: int, embed_dim: int) -> dict[str, Any]:
    return merge(
        gpt2(),
        {
            "num_layers": num_layers,
            "embed_dim": embed_dim,
            "attention": {"num_heads": num_heads},
            "feedforward": {"mlp_dim": 4 * embed_dim},
        },
    )


def gpt2_medium() -> dict[str, Any]:
    """355M: 24 layers, embed_dim 1024."""
    return _sized(24, 16, 1024)


def gpt2_large() -> dict[str, Any]:
    """774M: 36 layers, embed_dim 1280."""
    return _sized(36, 20, 1280)


def gpt2_xl() -> dict[str, Any]:
    """1.56B: 48 layers, embed_dim 1600."""
    return _sized(48, 25, 1600)
