"""Llama: its table of names and its settings, on which other architectures build (`variants.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polygpt.interop.huggingface.families import (
    Family,
    activation,
    foreign_activation,
    read_rope,
    shared_fields,
    shared_settings,
    write_rope,
)
from polygpt.interop.names import NameTable
from polygpt.interop.settings import Settings
from polygpt.model import ModelConfig

Fields = dict[str, Any]
LAYER = "model.layers.{layer}."


def projection(theirs: str, ours: str) -> dict[str, str]:
    """A matrix and its bias."""
    return {f"{LAYER}{theirs}.weight": f"blocks.{ours}", f"{LAYER}{theirs}.bias": f"blocks.{ours}_bias"}


EMBEDDING = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "final_norm.gain",
    "lm_head.weight": "head",
}
ATTENTION = {
    f"{LAYER}input_layernorm.weight": "blocks.attention_norm.gain",
    **projection("self_attn.q_proj", "attention.query"),
    **projection("self_attn.k_proj", "attention.key"),
    **projection("self_attn.v_proj", "attention.value"),
    **projection("self_attn.o_proj", "attention.out"),
}
FEEDFORWARD_NORM = {f"{LAYER}post_attention_layernorm.weight": "blocks.feedforward_norm.gain"}
GLU = {
    **projection("mlp.gate_proj", "feedforward.gate"),
    **projection("mlp.up_proj", "feedforward.up"),
    **projection("mlp.down_proj", "feedforward.down"),
}
NAMES = {**EMBEDDING, **ATTENTION, **FEEDFORWARD_NORM, **GLU}


def read_shared(settings: Settings, *, partial: bool = False) -> Fields:
    """What all of them say alike; the caller adds norm and feed-forward, and changes what differs.

    `partial`: a share of each head may turn.
    """
    heads = settings.take("num_attention_heads", int)
    width = settings.take("hidden_size", int)
    attention: Fields = {
        "kind": "softmax",
        "num_heads": heads,
        "num_kv_heads": settings.take("num_key_value_heads", int, heads),
        "dropout": settings.take("attention_dropout", float, 0.0),
    }
    head_dim = settings.take("head_dim", int, None)
    if head_dim is not None and head_dim * heads != width:
        attention["head_dim"] = head_dim
    return shared_fields(settings) | {
        "context_length": settings.take("max_position_embeddings", int),
        "embed_dim": width,
        "num_layers": settings.take("num_hidden_layers", int),
        "position": read_rope(settings, partial),
        "attention": attention,
    }


def write_shared(model: ModelConfig) -> Fields:
    """The settings that all of them share."""
    layer = model.layers[0]
    attention, norm = layer.attention, layer.norm
    settings = {
        **shared_settings(model),
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": getattr(attention, "num_heads", 1),
        "num_key_value_heads": getattr(attention, "kv_heads", 1),
        "intermediate_size": getattr(layer.feedforward, "mlp_dim", 1),
        "max_position_embeddings": model.context_length,
        "attention_dropout": getattr(attention, "dropout", 0.0),
        "initializer_range": model.init_std,
        **write_rope(model),
    }
    settings["hidden_act"] = foreign_activation(getattr(layer.feedforward, "activation", "silu"))
    if hasattr(attention, "num_heads"):
        settings["head_dim"] = attention.size(model)
    if hasattr(norm, "eps"):
        settings["rms_norm_eps"] = norm.eps
    return settings


def rmsnorm(settings: Settings) -> Fields:
    return {"kind": "rmsnorm", "eps": settings.take("rms_norm_eps", float, 1e-6)}


def glu(settings: Settings) -> Fields:
    hidden = settings.take("intermediate_size", int)
    return {"kind": "glu", "mlp_dim": hidden, "activation": activation(settings, "hidden_act", default="silu")}


def _read_llama(settings: Settings) -> Fields:
    fields = read_shared(settings) | {"norm": rmsnorm(settings), "feedforward": glu(settings)}
    fields["attention"]["bias"] = settings.take("attention_bias", bool, False)
    fields["feedforward"]["bias"] = settings.take("mlp_bias", bool, False)
    return fields


def _write_llama(model: ModelConfig) -> Fields:
    layer = model.layers[0]
    biases = {"attention_bias": getattr(layer.attention, "bias", False) is True}
    return write_shared(model) | biases | {"mlp_bias": bool(getattr(layer.feedforward, "bias", False))}


def family(
    architecture: str, model_type: str, names: NameTable, read: Callable, write: Callable, **defaults: Any
) -> Family:
    """A `Family` whose tensors are called as Llama's are, with the defaults of its class."""
    # Older checkpoints of some carry the angles' frequencies along.
    return Family(architecture, model_type, names, "model.", read, write, defaults, ignored=r".*rotary_emb\.inv_freq")


LLAMA = family("LlamaForCausalLM", "llama", NAMES, _read_llama, _write_llama, max_position_embeddings=2048)
