"""The core family: GPT-2's shape and its variants, one change at a time."""

from __future__ import annotations

from typing import Any

from polygpt.config import merge


def gpt() -> dict[str, Any]:
    """GPT-2 124M with the vocabulary padded to a multiple of 128."""
    return {
        "vocab_size": 50304,
        "context_length": 1024,
        "embed_dim": 768,
        "num_layers": 12,
        "position": {"kind": "learned"},
        "norm": {"kind": "layernorm", "eps": 1e-5},
        "attention": {"kind": "softmax", "num_heads": 12, "bias": True},
        "feedforward": {"kind": "mlp", "mlp_dim": 3072, "activation": "gelu"},
    }


def vgpt() -> dict[str, Any]:
    """GPT-2 as in Hugging Face checkpoints: 50257 tokens, dropout 0.1; fan-in initialisation."""
    return merge(
        gpt(),
        {
            "vocab_size": 50257,
            "dropout": 0.1,
            "embed_dropout": 0.1,
            "attention": {"dropout": 0.1},
            "init": "fan_in",
        },
    )


def nope_gpt() -> dict[str, Any]:
    """No position embedding."""
    return merge(gpt(), {"position": {"kind": "none"}})


def glu_gpt() -> dict[str, Any]:
    """A gated feed-forward with the same hidden size."""
    return merge(gpt(), {"feedforward": {"kind": "glu", "mlp_dim": 3072, "activation": "silu"}})


def rope_gpt() -> dict[str, Any]:
    """Rotary position."""
    return merge(gpt(), {"position": {"kind": "rope", "theta": 10000.0}})


def glu_rope_gpt() -> dict[str, Any]:
    """Gated feed-forward and rotary position."""
    return merge(glu_gpt(), {"position": {"kind": "rope", "theta": 10000.0}})


def gqa_gpt() -> dict[str, Any]:
    """Grouped-query attention in a narrower model."""
    return merge(gpt(), {"embed_dim": 576, "attention": {"num_heads": 9, "num_kv_heads": 3, "bias": False}})


def gqa_glu_rope_gpt() -> dict[str, Any]:
    """Grouped-query attention, gated feed-forward, rotary position."""
    return merge(glu_rope_gpt(), {"attention": {"num_kv_heads": 4, "bias": False}})


def smollm() -> dict[str, Any]:
    """SmolLM 135M (Hugging Face 2024): a Llama of 30 narrow layers."""
    return {
        "vocab_size": 49152,
        "context_length": 2048,
        "embed_dim": 576,
        "num_layers": 30,
        "position": {"kind": "rope", "theta": 10000.0},
        "norm": {"kind": "rmsnorm", "eps": 1e-5},
        "attention": {"kind": "softmax", "num_heads": 9, "num_kv_heads": 3},
        "feedforward": {"kind": "glu", "mlp_dim": 1536, "activation": "silu"},
    }
