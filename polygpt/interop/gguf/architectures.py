"""llama.cpp's architectures `llama` and `gpt2`: tensor names, and metadata for our settings.

The keys are those of github.com/ggml-org/ggml, docs/gguf.md; what that leaves open is as in llama.cpp. What only the
tensors tell (a head of its own, biases, rotary factors) is a pseudo-setting called `tensors.…`: `tensor_settings` makes
them when a file is read, and export leaves them out of the metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from polygpt.interop.architecture import Architecture, Fields, Heads, Rule, Setting, flag, required
from polygpt.interop.gguf.rope import FACTORS, read_rope, write_rope
from polygpt.interop.names import Layout, affine
from polygpt.interop.weights import TensorInfo
from polygpt.settings import Settings

HEAD, EMBEDDING, ROPE_FREQS = "output.weight", "token_embd.weight", "rope_freqs.weight"
PSEUDO = "tensors."
_L = "blk.{layer}."


def tensor_settings(tensors: Mapping[str, TensorInfo], rope_freqs: np.ndarray | None) -> dict[str, Any]:
    """The pseudo-settings of a file with these tensors.

    The vocabulary's size is that of the embedding: its key is missing or wrong in many files, and llama.cpp does not
    look at it where there are tokens.
    """
    bias = "blk.0.attn_q.bias" in tensors and ("blk.0.attn_output.bias" in tensors or "qkv")
    return {
        "vocab_size": tensors[EMBEDDING].shape[0],
        f"{PSEUDO}head": HEAD in tensors,
        f"{PSEUDO}attention_bias": bias,
        f"{PSEUDO}feedforward_bias": "blk.0.ffn_up.bias" in tensors,
        FACTORS: rope_freqs,
    }


def _read_feedforward(settings: Settings, fields: Fields) -> None:
    if not settings.take("expert_count", int, 0):
        fields |= {"feedforward.kind": "glu", "feedforward.bias": settings.get(f"{PSEUDO}feedforward_bias")}
        settings.ignore("expert_used_count")
        return
    settings.require("expert_shared_count", 0, "experts that serve every token are not supported")
    fields |= {
        "feedforward.kind": "moe",
        "feedforward.num_experts": settings.take("expert_count", int),
        "feedforward.top_k": settings.take("expert_used_count", int, 0),
        "feedforward.normalize_weights": True,
        "feedforward.dispatch": "dropless",
    }


def _write_feedforward(fields: Fields) -> dict[str, Any]:
    if "feedforward.num_experts" not in fields:
        return {f"{PSEUDO}feedforward_bias": fields.get("feedforward.bias", False)}
    counts = fields["feedforward.num_experts"], fields.get("feedforward.top_k", 1)
    return dict(zip(("expert_count", "expert_used_count"), counts, strict=True))


def _read_bias(settings: Settings, fields: Fields) -> None:
    fields["attention.bias"] = settings.get(f"{PSEUDO}attention_bias")


def _write_bias(fields: Fields) -> dict[str, Any]:
    return {f"{PSEUDO}attention_bias": fields.get("attention.bias", False)}


def _refuse_window(settings: Settings, fields: Fields) -> None:
    window = settings.take("attention.sliding_window", int, None)
    if window is not None and window < fields["context_length"]:
        raise settings.error(
            f"'attention.sliding_window' is {window}, which llama.cpp ignores here, so its meaning is ambiguous"
        )


def _refuse_shared_keys(settings: Settings, fields: Fields) -> None:
    heads = fields["attention.num_heads"]
    settings.require("attention.head_count_kv", heads, f"this architecture has as many as queries, {heads}")


_SHARED_NAMES = {EMBEDDING: "embedding", HEAD: "head"}
_NORMS = {
    "output_norm.weight": "final_norm.gain",
    f"{_L}attn_norm.weight": "blocks.attention_norm.gain",
    f"{_L}ffn_norm.weight": "blocks.feedforward_norm.gain",
}
_SHARED = (
    Setting("vocab_size", "vocab_size"),
    Setting("context_length", "context_length"),
    Setting("embedding_length", "embed_dim"),
    Setting("block_count", "num_layers"),
    Setting("feed_forward_length", "feedforward.mlp_dim"),
    flag(f"{PSEUDO}head", "head", true="untied", false="tied"),
)
_WHOLE_HEADS = "values must have the size of keys, and whole heads are rotated"

LLAMA = Architecture(
    name="llama",
    names={
        **_SHARED_NAMES,
        **_NORMS,
        **affine(f"{_L}attn_q", "blocks.attention.query"),
        **affine(f"{_L}attn_k", "blocks.attention.key"),
        **affine(f"{_L}attn_v", "blocks.attention.value"),
        **affine(f"{_L}attn_output", "blocks.attention.out"),
        **affine(f"{_L}ffn_gate", "blocks.feedforward.gate"),
        **affine(f"{_L}ffn_up", "blocks.feedforward.up"),
        **affine(f"{_L}ffn_down", "blocks.feedforward.down"),
        # Of experts (Mixtral's files call themselves llama, too), as older files name them. Newer files stack a
        # layer's experts: `experts.py` splits and stacks.
        f"{_L}ffn_gate_inp.weight": "blocks.feedforward.router",
        **{f"{_L}ffn_{part}.{{expert}}.weight": f"blocks.feedforward.{part}" for part in ("gate", "up", "down")},
    },
    settings=(
        required("attention.causal", True, "a model that sees the future cannot generate"),
        *_SHARED,
        Heads(
            "attention.head_count",
            "attention.head_count_kv",
            "attention.key_length",
            {"attention.value_length": _WHOLE_HEADS, "rope.dimension_count": _WHOLE_HEADS},
        ),
        Rule(_read_bias, _write_bias),
        Rule(_refuse_window),
        Rule(read_rope, write_rope),
        Setting("attention.layer_norm_rms_epsilon", "norm.eps", float),
        Rule(_read_feedforward, _write_feedforward),
    ),
    fixed={"attention.kind": "softmax", "norm.kind": "rmsnorm", "feedforward.activation": "silu"},
    layout=Layout(
        interleaved=frozenset(f"blocks.attention.{name}" for name in ("query", "query_bias", "key", "key_bias"))
    ),
)
GPT2 = Architecture(
    name="gpt2",
    names={
        **_SHARED_NAMES,
        **_NORMS,
        **{name.replace("weight", "bias"): ours.replace("gain", "bias") for name, ours in _NORMS.items()},
        "position_embd.weight": "position.table",
        **affine(f"{_L}attn_qkv", tuple(f"blocks.attention.{part}" for part in ("query", "key", "value"))),
        **affine(f"{_L}attn_output", "blocks.attention.out"),
        **affine(f"{_L}ffn_up", "blocks.feedforward.up"),
        **affine(f"{_L}ffn_down", "blocks.feedforward.down"),
    },
    settings=(
        *_SHARED,
        Setting("attention.head_count", "attention.num_heads"),
        Rule(_refuse_shared_keys),
        Setting("attention.layer_norm_epsilon", "norm.eps", float),
    ),
    fixed={
        "position.kind": "learned",
        "norm.kind": "layernorm",
        "attention.kind": "softmax",
        "attention.bias": True,
        "feedforward.kind": "mlp",
        "feedforward.activation": "gelu",
    },
    zero_biases=True,
)
ARCHITECTURES = {architecture.name: architecture for architecture in (LLAMA, GPT2)}
