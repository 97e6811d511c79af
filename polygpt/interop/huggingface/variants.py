"""The architectures that vary Llama: Mistral, Qwen 2 and 3, Mixtral, Gemma 2, Phi-3, StableLM, Starcoder 2.

Each is Llama's table of names with some lines changed, and Llama's settings with some more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polygpt.interop.huggingface.families import activation
from polygpt.interop.huggingface.llama import (
    ATTENTION,
    EMBEDDING,
    FEEDFORWARD_NORM,
    LAYER,
    NAMES,
    Fields,
    family,
    glu,
    projection,
    read_shared,
    rmsnorm,
    write_shared,
)
from polygpt.interop.settings import Settings
from polygpt.model import ModelConfig

_QK_NORM = {
    f"{LAYER}self_attn.q_norm.weight": "blocks.attention.query_norm",
    f"{LAYER}self_attn.k_norm.weight": "blocks.attention.key_norm",
}
_EXPERTS = {
    f"{LAYER}block_sparse_moe.gate.weight": "blocks.feedforward.router",
    f"{LAYER}block_sparse_moe.experts.{{expert}}.w1.weight": "blocks.feedforward.gate",
    f"{LAYER}block_sparse_moe.experts.{{expert}}.w3.weight": "blocks.feedforward.up",
    f"{LAYER}block_sparse_moe.experts.{{expert}}.w2.weight": "blocks.feedforward.down",
}
_FUSED = {
    f"{LAYER}self_attn.qkv_proj.weight": tuple(f"blocks.attention.{part}" for part in ("query", "key", "value")),
    f"{LAYER}self_attn.o_proj.weight": "blocks.attention.out",
    f"{LAYER}mlp.gate_up_proj.weight": ("blocks.feedforward.gate", "blocks.feedforward.up"),
    f"{LAYER}mlp.down_proj.weight": "blocks.feedforward.down",
}
_SANDWICH = {
    f"{LAYER}post_attention_layernorm.weight": "blocks.attention_out_norm.gain",
    f"{LAYER}pre_feedforward_layernorm.weight": "blocks.feedforward_norm.gain",
    f"{LAYER}post_feedforward_layernorm.weight": "blocks.feedforward_out_norm.gain",
}
_NORM_BIASES = {
    "model.norm.bias": "final_norm.bias",
    f"{LAYER}input_layernorm.bias": "blocks.attention_norm.bias",
    f"{LAYER}post_attention_layernorm.bias": "blocks.feedforward_norm.bias",
}
_MLP = {**projection("mlp.c_fc", "feedforward.up"), **projection("mlp.c_proj", "feedforward.down")}


def _windowed(read: Callable[[Settings], Fields]) -> Callable[[Settings], Fields]:
    """`sliding_window` for every layer."""

    def windowed(settings: Settings) -> Fields:
        fields = read(settings)
        fields["attention"]["window"] = settings.take("sliding_window", int, None)
        return fields

    return windowed


def _write_windowed(model: ModelConfig) -> Fields:
    return write_shared(model) | {"sliding_window": getattr(model.layers[0].attention, "window", None)}


def _read_mistral(settings: Settings) -> Fields:
    return read_shared(settings) | {"norm": rmsnorm(settings), "feedforward": glu(settings)}


def _read_qwen(settings: Settings) -> Fields:
    """Qwen 2 and 3: with `use_sliding_window`, the layers from `max_window_layers` on have one."""
    fields = read_shared(settings) | {"norm": rmsnorm(settings), "feedforward": glu(settings)}
    window = settings.take("sliding_window", int, None)
    used = settings.take("use_sliding_window", bool, False)
    first, layers = settings.take("max_window_layers", int), fields["num_layers"]
    kinds = settings.get("layer_types") or [
        "sliding_attention" if used and i >= first else "full_attention" for i in range(layers)
    ]
    return fields | _pattern(settings, kinds, window if used else None, layers)


def _pattern(settings: Settings, kinds: Any, window: int | None, layers: int) -> Fields:
    """The shortest pattern of windows that `layer_types` repeats."""
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in list(known) for kind in kinds):
        raise settings.error(f"'layer_types' must name full_attention or sliding_attention for each of {layers} layers")
    windows = [known[kind] for kind in kinds]
    if len(set(windows)) == 1:
        return {} if windows[0] is None else {"pattern": [{"attention": {"window": windows[0]}}]}
    period = next(n for n in range(1, layers + 1) if all(windows[i] == windows[i % n] for i in range(layers)))
    return {"pattern": [{"attention": {"window": window}} for window in windows[:period]]}


def _layer_types(model: ModelConfig) -> Fields:
    windows = [getattr(layer.attention, "window", None) for layer in model.layers]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {"layer_types": kinds, "sliding_window": next((w for w in windows if w is not None), None)}


def _read_qwen2(settings: Settings) -> Fields:
    fields = _read_qwen(settings)
    fields["attention"]["bias"] = "qkv"
    return fields


def _read_qwen3(settings: Settings) -> Fields:
    fields = _read_qwen(settings)
    fields["attention"]["bias"] = settings.take("attention_bias", bool, False)
    return _with_qk_norm(fields)


def _with_qk_norm(fields: Fields) -> Fields:
    fields["attention"] |= {"qk_norm": True, "qk_norm_eps": fields["norm"]["eps"]}
    return fields


def _write_qwen(model: ModelConfig) -> Fields:
    types = _layer_types(model)
    used = types["sliding_window"] is not None
    bias = getattr(model.layers[0].attention, "bias", False) is True
    return write_shared(model) | types | {"use_sliding_window": used, "max_window_layers": 0, "attention_bias": bias}


def _write_qwen2(model: ModelConfig) -> Fields:
    settings = _write_qwen(model)
    del settings["attention_bias"]
    del settings["head_dim"]
    return settings


def _read_mixtral(settings: Settings) -> Fields:
    hidden, act = settings.take("intermediate_size", int), activation(settings, "hidden_act", default="silu")
    experts = {
        "kind": "moe",
        "mlp_dim": hidden,
        "activation": act,
        "num_experts": settings.take("num_local_experts", int, 8),
        "top_k": settings.take("num_experts_per_tok", int, 2),
        "normalize_weights": True,
        "dispatch": "dropless",
        "load_balance_loss": settings.take("router_aux_loss_coef", float, 1e-3),
        "z_loss": 0.0,
        "router_noise": settings.take("router_jitter_noise", float, 0.0),
    }
    return read_shared(settings) | {"norm": rmsnorm(settings), "feedforward": experts}


def _write_mixtral(model: ModelConfig) -> Fields:
    experts = model.layers[0].feedforward
    return _write_windowed(model) | {
        "num_local_experts": getattr(experts, "num_experts", 1),
        "num_experts_per_tok": getattr(experts, "top_k", 1),
        "router_aux_loss_coef": getattr(experts, "load_balance_loss", 0.0),
        "router_jitter_noise": getattr(experts, "router_noise", 0.0),
    }


def _read_gemma2(settings: Settings) -> Fields:
    fields = read_shared(settings)
    layers = fields["num_layers"]
    settings.require("use_bidirectional_attention", False, "only causal attention is known here")
    scalar = settings.take("query_pre_attn_scalar", float)
    if scalar <= 0:
        raise settings.error(f"'query_pre_attn_scalar' is {scalar}; it must be greater than 0")
    hidden_act = activation(settings, "hidden_activation", default="gelu_pytorch_tanh")
    settings.ignore("hidden_act", "cache_implementation")
    fields["attention"] |= {
        "bias": settings.take("attention_bias", bool, False),
        "scale": scalar**-0.5,
        "softcap": settings.take("attn_logit_softcapping", float, None),
    }
    kinds = settings.get("layer_types") or [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    window = settings.take("sliding_window", int, None)
    glu = {"kind": "glu", "mlp_dim": settings.take("intermediate_size", int), "activation": hidden_act}
    return (
        fields
        | _pattern(settings, kinds, window, layers)
        | {
            "norm": {**rmsnorm(settings), "unit_offset": True},
            "feedforward": glu,
            "block": {"kind": "sandwich"},
            "embed_scale": "sqrt",
            "logit_softcap": settings.take("final_logit_softcapping", float, None),
        }
    )


def _write_gemma2(model: ModelConfig) -> Fields:
    attention = model.layers[0].attention
    settings = write_shared(model) | _layer_types(model)
    settings["hidden_activation"] = {"gelu_new": "gelu_pytorch_tanh"}.get(
        settings["hidden_act"], settings.pop("hidden_act")
    )
    scale = getattr(attention, "scale", None)
    if hasattr(attention, "num_heads"):
        settings["query_pre_attn_scalar"] = attention.size(model) if scale is None else _whole(scale**-2)
    return settings | {
        "attention_bias": getattr(attention, "bias", False) is True,
        "attn_logit_softcapping": getattr(attention, "softcap", None),
        "final_logit_softcapping": model.logit_softcap,
    }


def _whole(value: float) -> float | int:
    """The whole number that rounding has missed, if it is one."""
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


def _read_phi3(settings: Settings) -> Fields:
    settings.ignore("original_max_position_embeddings")
    fields = read_shared(settings, partial=True)
    if "scaling" in fields["position"]:
        raise settings.error("'rope_parameters' scales; of this architecture only plain angles are known")
    fields |= {"norm": rmsnorm(settings), "feedforward": glu(settings)}
    return fields | {
        "dropout": settings.take("resid_pdrop", float, 0.0),
        "embed_dropout": settings.take("embd_pdrop", float, 0.0),
    }


def _write_phi3(model: ModelConfig) -> Fields:
    dropouts = {"resid_pdrop": model.dropout, "embd_pdrop": model.embed_dropout}
    # The class's defaults lie outside a small vocabulary, which transformers warns of.
    settings = _write_windowed(model) | dropouts | {"pad_token_id": None}
    return settings | {"original_max_position_embeddings": model.context_length}


def _layernorm(settings: Settings, name: str) -> Fields:
    return {"kind": "layernorm", "eps": settings.take(name, float, 1e-5)}


def _read_stablelm(settings: Settings) -> Fields:
    settings.require("qk_layernorm", False, "only RMS norms of queries and keys are known here")
    settings.require("use_parallel_residual", False, "its one norm has no counterpart here")
    fields = read_shared(settings, partial=True) | {"norm": _layernorm(settings, "layer_norm_eps")}
    fields["attention"]["bias"] = "qkv" if settings.take("use_qkv_bias", bool, False) else False
    return fields | {"feedforward": glu(settings), "dropout": settings.take("hidden_dropout", float, 0.0)}


def _write_stablelm(model: ModelConfig) -> Fields:
    settings = write_shared(model)
    eps, bias = settings.pop("rms_norm_eps", None), getattr(model.layers[0].attention, "bias", False)
    settings |= {"layer_norm_eps": eps, "use_qkv_bias": bias == "qkv", "hidden_dropout": model.dropout}
    del settings["head_dim"]
    return {"partial_rotary_factor": 1.0} | settings


def _read_starcoder2(settings: Settings) -> Fields:
    fields = read_shared(settings) | {"norm": _layernorm(settings, "norm_epsilon")}
    bias = settings.take("use_bias", bool, True)
    fields["attention"]["bias"] = bias
    act = activation(settings, "hidden_act", default="gelu_pytorch_tanh")
    mlp = {"kind": "mlp", "mlp_dim": settings.take("intermediate_size", int), "activation": act, "bias": bias}
    dropouts = {"dropout": "residual_dropout", "embed_dropout": "embedding_dropout"}
    settings.ignore("mlp_type", "norm_type")
    return fields | {"feedforward": mlp} | {ours: settings.take(name, float, 0.0) for ours, name in dropouts.items()}


def _write_starcoder2(model: ModelConfig) -> Fields:
    settings = _write_windowed(model)
    settings["hidden_act"] = {"gelu_new": "gelu_pytorch_tanh"}.get(settings["hidden_act"], settings["hidden_act"])
    settings["norm_epsilon"] = settings.pop("rms_norm_eps", None)
    del settings["head_dim"]
    bias = getattr(model.layers[0].attention, "bias", False) is True
    return settings | {"use_bias": bias, "residual_dropout": model.dropout, "embedding_dropout": model.embed_dropout}


_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
VARIANTS = (
    family(
        "MistralForCausalLM",
        "mistral",
        NAMES,
        _windowed(_read_mistral),
        _write_windowed,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        sliding_window=4096,
    ),
    family("Qwen2ForCausalLM", "qwen2", NAMES, _read_qwen2, _write_qwen2, **_QWEN),
    family("Qwen3ForCausalLM", "qwen3", NAMES | _QK_NORM, _read_qwen3, _write_qwen, **_QWEN, head_dim=128),
    family(
        "MixtralForCausalLM",
        "mixtral",
        {**EMBEDDING, **ATTENTION, **FEEDFORWARD_NORM, **_EXPERTS},
        _windowed(_read_mixtral),
        _write_mixtral,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
    ),
    family(
        "Gemma2ForCausalLM",
        "gemma2",
        NAMES | _SANDWICH,
        _read_gemma2,
        _write_gemma2,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=8192,
        sliding_window=4096,
        query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
    ),
    family(
        "Phi3ForCausalLM",
        "phi3",
        {**EMBEDDING, f"{LAYER}input_layernorm.weight": "blocks.attention_norm.gain", **FEEDFORWARD_NORM, **_FUSED},
        _windowed(_read_phi3),
        _write_phi3,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    ),
    family(
        "StableLmForCausalLM",
        "stablelm",
        NAMES | _NORM_BIASES,
        _read_stablelm,
        _write_stablelm,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        partial_rotary_factor=0.25,
    ),
    family(
        "Starcoder2ForCausalLM",
        "starcoder2",
        {**EMBEDDING, **ATTENTION, **FEEDFORWARD_NORM, **_NORM_BIASES, **_MLP},
        _windowed(_read_starcoder2),
        _write_starcoder2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    ),
)
