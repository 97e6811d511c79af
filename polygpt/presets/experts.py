"""Mixture-of-experts models."""

from __future__ import annotations

from typing import Any

from polygpt.config import merge

EXPERTS = {"mlp_dim": 2304, "num_experts": 8, "activation": "silu", "bias": True}
ROUTED = {**EXPERTS, "kind": "moe", "top_k": 2, "load_balance_loss": 1e-2}


def _narrow() -> dict[str, Any]:
    """32 narrow layers; odd ones have a gated feed-forward, even ones what each preset says."""
    return {
        "vocab_size": 50304,
        "context_length": 2048,
        "embed_dim": 576,
        "num_layers": 32,
        "position": {"kind": "rope", "theta": 10000.0},
        "norm": {"kind": "rmsnorm", "eps": 1e-6},
        "attention": {"kind": "softmax", "num_heads": 12, "num_kv_heads": 4},
        "feedforward": {"kind": "glu", "mlp_dim": 2304, "activation": "silu"},
        "compute_dtype": "bfloat16",
    }


def tiny_moe() -> dict[str, Any]:
    """Every other layer has 8 experts, of which a token uses 2; tokens claim slots in order of their routing weight."""
    experts = {**ROUTED, "capacity_factor": 1.1, "claim_order": "weight", "z_loss": 1e-3}
    return merge(_narrow(), {"pattern": [{"feedforward": experts}, {}]})


def tiny_moe_2() -> dict[str, Any]:
    """Every layer has 8 experts without biases; tokens claim slots in order of position."""
    own = {"mlp_dim": 2048, "bias": False, "capacity_factor": 1.25, "claim_order": "choice", "z_loss": 1e-4}
    changes = {"embed_dim": 672, "num_layers": 30, "norm": {"eps": 1e-5}, "feedforward": {**ROUTED, **own}}
    return merge(_narrow(), changes)


def tiny_moe_3() -> dict[str, Any]:
    """Every other layer is a soft mixture: 8 experts with 256 slots each; a slot is a weighted mean of tokens."""
    experts = {"kind": "soft_moe", **EXPERTS, "slots_per_expert": 256}
    return merge(_narrow(), {"pattern": [{"feedforward": experts}, {}]})
