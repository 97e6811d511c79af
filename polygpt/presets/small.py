"""Small and educational models; most leave the vocabulary to the tokenizer."""

from __future__ import annotations

from typing import Any


def giant() -> dict[str, Any]:
    """Two layers of multi-query attention and a gated feed-forward of a third of the usual hidden size."""
    return {
        "context_length": 257,
        "embed_dim": 256,
        "num_layers": 2,
        "position": {"kind": "rope", "theta": 10000.0},
        "norm": {"kind": "rmsnorm", "eps": 1e-6},
        "attention": {"kind": "softmax", "num_heads": 2, "num_kv_heads": 1},
        "feedforward": {"kind": "glu", "mlp_dim": 1024 // 3, "activation": "silu"},
        "compute_dtype": "bfloat16",
    }


def modular() -> dict[str, Any]:
    """Sinusoidal positions, RMSNorm, SwiGLU, untied head, dropout 0.1."""
    return {
        "context_length": 256,
        "embed_dim": 256,
        "num_layers": 6,
        "position": {"kind": "sinusoidal"},
        "norm": {"kind": "rmsnorm", "eps": 1e-6},
        "attention": {"kind": "softmax", "num_heads": 8, "dropout": 0.1},
        "feedforward": {"kind": "glu", "mlp_dim": 1024, "activation": "silu"},
        "head": "untied",
        "dropout": 0.1,
        "embed_dropout": 0.1,
    }


def small() -> dict[str, Any]:
    """A textbook transformer: learned positions, ReLU, untied head without bias."""
    return {
        "context_length": 512,
        "embed_dim": 512,
        "num_layers": 6,
        "position": {"kind": "learned"},
        "norm": {"kind": "layernorm", "eps": 1e-5},
        "attention": {"kind": "softmax", "num_heads": 8},
        "feedforward": {"kind": "mlp", "mlp_dim": 2048, "activation": "relu"},
        "head": "untied",
    }


def charformer() -> dict[str, Any]:
    """30 layers on 256 bytes and 3 special tokens; ReLU, bfloat16 throughout, spread over 8 devices if there are.

    4 devices cannot share 15 heads: each holds all of them.
    """
    return {
        "vocab_size": 259,
        "context_length": 1024,
        "embed_dim": 960,
        "num_layers": 30,
        "position": {"kind": "learned"},
        "norm": {"kind": "layernorm", "eps": 1e-5},
        "attention": {"kind": "softmax", "num_heads": 15},
        "feedforward": {"kind": "mlp", "mlp_dim": 3840, "activation": "relu"},
        "compute_dtype": "bfloat16",
        "param_dtype": "bfloat16",
        "layout": {"data": 2, "tensor": 4, "rules": {"heads": None, "kv_heads": None}},
    }


def tiny_large() -> dict[str, Any]:
    """A small GPT for TinyStories."""
    return {
        "context_length": 256,
        "embed_dim": 384,
        "num_layers": 6,
        "position": {"kind": "learned"},
        "norm": {"kind": "layernorm", "eps": 1e-5},
        "attention": {"kind": "softmax", "num_heads": 6},
        "feedforward": {"kind": "mlp", "mlp_dim": 1536, "activation": "gelu"},
    }


def bigram() -> dict[str, Any]:
    """A table of logits: row i holds the logits of the token that follows token i. A baseline."""
    return {
        "context_length": 1024,
        "embed_dim": None,
        "num_layers": 0,
        "position": {"kind": "none"},
        "norm": {"kind": "none"},
        "head": "none",
    }
