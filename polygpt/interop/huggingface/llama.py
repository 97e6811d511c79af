"""Llama and the architectures that vary it; each is a table of the names and settings that differ."""

from __future__ import annotations

from typing import Any

from polygpt.interop.architecture import Architecture, Fields, Heads, Rule, Setting, flag, required, written
from polygpt.interop.huggingface.rules import QUERY_KEY_VALUE, TIED, Activation, LayerWindows, Rope
from polygpt.interop.names import affine
from polygpt.settings import Settings

_L = "model.layers.{layer}."
_EMBEDDING = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "final_norm.gain",
    "lm_head.weight": "head",
}
_PROJECTIONS = {
    f"{_L}input_layernorm.weight": "blocks.attention_norm.gain",
    **affine(f"{_L}self_attn.q_proj", "blocks.attention.query"),
    **affine(f"{_L}self_attn.k_proj", "blocks.attention.key"),
    **affine(f"{_L}self_attn.v_proj", "blocks.attention.value"),
    **affine(f"{_L}self_attn.o_proj", "blocks.attention.out"),
    f"{_L}post_attention_layernorm.weight": "blocks.feedforward_norm.gain",
}
_GLU = {
    **affine(f"{_L}mlp.gate_proj", "blocks.feedforward.gate"),
    **affine(f"{_L}mlp.up_proj", "blocks.feedforward.up"),
    **affine(f"{_L}mlp.down_proj", "blocks.feedforward.down"),
}
_NAMES = _EMBEDDING | _PROJECTIONS | _GLU
_NORM_BIASES = {
    "model.norm.bias": "final_norm.bias",
    f"{_L}input_layernorm.bias": "blocks.attention_norm.bias",
    f"{_L}post_attention_layernorm.bias": "blocks.feedforward_norm.bias",
}
_SHARED = (
    Setting("vocab_size", "vocab_size"),
    TIED,
    Setting("hidden_size", "embed_dim"),
    Setting("num_hidden_layers", "num_layers"),
    Setting("max_position_embeddings", "context_length"),
    Setting("intermediate_size", "feedforward.mlp_dim"),
    Setting("attention_dropout", "attention.dropout", float, 0.0),
    written("initializer_range", "init_std"),
)
_HEADS = Heads("num_attention_heads", "num_key_value_heads", "head_dim")
_HEADS_BY_WIDTH = Heads("num_attention_heads", "num_key_value_heads", "head_dim", writes_head_dim=False)
_SILU, _GELU = Activation("hidden_act", "silu"), Activation("hidden_act", "gelu_pytorch_tanh")
_RMS_NORM = Setting("rms_norm_eps", "norm.eps", float, 1e-6)
_WINDOW = Setting("sliding_window", "attention.window", int, None)
_ATTENTION_BIAS = flag("attention_bias", "attention.bias")
_BASE = (*_SHARED, _HEADS, Rope(), _SILU, _RMS_NORM)
_QK_NORM_EPS = Setting("rms_norm_eps", "attention.qk_norm_eps", float, 1e-6)


def _variant(model_type: str, name: str, *, fixed: Fields | None = None, **table: Any) -> Architecture:
    """An architecture with Llama's names of tensors; `fixed` are the fields that differ from Llama's."""
    llama = {"attention.kind": "softmax", "norm.kind": "rmsnorm", "feedforward.kind": "glu"}
    ignored = r".*rotary_emb\.inv_freq"  # stored in some older checkpoints
    return Architecture(
        name=name, model_type=model_type, prefix="model.", fixed=llama | (fixed or {}), ignored=ignored, **table
    )


LLAMA = _variant(
    "llama",
    "LlamaForCausalLM",
    names=_NAMES,
    settings=(*_BASE, _ATTENTION_BIAS, flag("mlp_bias", "feedforward.bias")),
    defaults={"max_position_embeddings": 2048},
)
MISTRAL = _variant(
    "mistral",
    "MistralForCausalLM",
    names=_NAMES,
    settings=(*_BASE, _WINDOW),
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
)
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
_NO_MROPE = required("use_mrope", False, "rotary positions of several dimensions are not supported")
QWEN2 = _variant(
    "qwen2",
    "Qwen2ForCausalLM",
    names=_NAMES,
    settings=(*_SHARED, _HEADS_BY_WIDTH, Rope(), _SILU, _RMS_NORM, LayerWindows(switched=True), _NO_MROPE),
    fixed={"attention.bias": "qkv"},
    defaults=_QWEN,
)
QWEN3 = _variant(
    "qwen3",
    "Qwen3ForCausalLM",
    names={
        **_NAMES,
        f"{_L}self_attn.q_norm.weight": "blocks.attention.query_norm",
        f"{_L}self_attn.k_norm.weight": "blocks.attention.key_norm",
    },
    settings=(_QK_NORM_EPS, *_BASE, _ATTENTION_BIAS, LayerWindows(switched=True), _NO_MROPE),
    fixed={"attention.qk_norm": True},
    defaults={**_QWEN, "head_dim": 128},
)
MIXTRAL = _variant(
    "mixtral",
    "MixtralForCausalLM",
    names={
        **_EMBEDDING,
        **_PROJECTIONS,
        f"{_L}block_sparse_moe.gate.weight": "blocks.feedforward.router",
        f"{_L}block_sparse_moe.experts.{{expert}}.w1.weight": "blocks.feedforward.gate",
        f"{_L}block_sparse_moe.experts.{{expert}}.w3.weight": "blocks.feedforward.up",
        f"{_L}block_sparse_moe.experts.{{expert}}.w2.weight": "blocks.feedforward.down",
    },
    settings=(
        *_BASE,
        _WINDOW,
        Setting("num_local_experts", "feedforward.num_experts", int, 8),
        Setting("num_experts_per_tok", "feedforward.top_k", int, 2),
        Setting("router_aux_loss_coef", "feedforward.load_balance_loss", float, 1e-3),
        Setting("router_jitter_noise", "feedforward.router_noise", float, 0.0),
    ),
    fixed={
        "feedforward.kind": "moe",
        "feedforward.normalize_weights": True,
        "feedforward.dispatch": "dropless",
        "feedforward.z_loss": 0.0,
    },
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
)


def _read_scale(settings: Settings, fields: Fields) -> None:
    scalar = settings.take("query_pre_attn_scalar", float)
    if scalar <= 0:
        raise settings.error(f"'query_pre_attn_scalar' is {scalar}; it must be greater than 0")
    fields["attention.scale"] = scalar**-0.5


def _write_scale(fields: Fields) -> dict[str, Any]:
    scalar = fields.get("attention.scale", 1.0) ** -2
    # The integer that rounding errors missed, if there is one.
    return {"query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar}


GEMMA2 = _variant(
    "gemma2",
    "Gemma2ForCausalLM",
    names={
        **_NAMES,
        f"{_L}post_attention_layernorm.weight": "blocks.attention_out_norm.gain",
        f"{_L}pre_feedforward_layernorm.weight": "blocks.feedforward_norm.gain",
        f"{_L}post_feedforward_layernorm.weight": "blocks.feedforward_out_norm.gain",
    },
    settings=(
        *_SHARED,
        _HEADS,
        Rope(),
        Activation("hidden_activation", "gelu_pytorch_tanh"),
        _RMS_NORM,
        _ATTENTION_BIAS,
        LayerWindows(switched=False),
        required("use_bidirectional_attention", False, "only causal attention is supported"),
        Rule(_read_scale, _write_scale),
        Setting("attn_logit_softcapping", "attention.softcap", float, None),
        Setting("final_logit_softcapping", "logit_softcap", float, None),
    ),
    fixed={"norm.unit_offset": True, "block.kind": "sandwich", "embed_scale": "sqrt"},
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
)
PHI3 = _variant(
    "phi3",
    "Phi3ForCausalLM",
    names={
        **_EMBEDDING,
        f"{_L}input_layernorm.weight": "blocks.attention_norm.gain",
        f"{_L}self_attn.qkv_proj.weight": QUERY_KEY_VALUE,
        f"{_L}self_attn.o_proj.weight": "blocks.attention.out",
        f"{_L}post_attention_layernorm.weight": "blocks.feedforward_norm.gain",
        f"{_L}mlp.gate_up_proj.weight": ("blocks.feedforward.gate", "blocks.feedforward.up"),
        f"{_L}mlp.down_proj.weight": "blocks.feedforward.down",
    },
    settings=(
        *_SHARED,
        _HEADS,
        Rope(partial=True, scalable=False),
        _SILU,
        _RMS_NORM,
        _WINDOW,
        Setting("resid_pdrop", "dropout", float, 0.0),
        Setting("embd_pdrop", "embed_dropout", float, 0.0),
        written("original_max_position_embeddings", "context_length"),
    ),
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
)
STABLELM = _variant(
    "stablelm",
    "StableLmForCausalLM",
    names=_NAMES | _NORM_BIASES,
    settings=(
        required("qk_layernorm", False, "only RMS norms of queries and keys are supported"),
        required("use_parallel_residual", False, "its one norm has no counterpart here"),
        *_SHARED,
        _HEADS_BY_WIDTH,
        Rope(partial=True),
        _SILU,
        Setting("layer_norm_eps", "norm.eps", float, 1e-5),
        flag("use_qkv_bias", "attention.bias", true="qkv"),
        Setting("hidden_dropout", "dropout", float, 0.0),
    ),
    fixed={"norm.kind": "layernorm"},
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 4096, "partial_rotary_factor": 0.25},
)
STARCODER2 = _variant(
    "starcoder2",
    "Starcoder2ForCausalLM",
    names={
        **_EMBEDDING,
        **_PROJECTIONS,
        **_NORM_BIASES,
        **affine(f"{_L}mlp.c_fc", "blocks.feedforward.up"),
        **affine(f"{_L}mlp.c_proj", "blocks.feedforward.down"),
    },
    settings=(
        *_SHARED,
        _HEADS_BY_WIDTH,
        Rope(),
        _GELU,
        _WINDOW,
        Setting("norm_epsilon", "norm.eps", float, 1e-5),
        flag("use_bias", "feedforward.bias", default=True),
        flag("use_bias", "attention.bias", default=True),
        Setting("residual_dropout", "dropout", float, 0.0),
        Setting("embedding_dropout", "embed_dropout", float, 0.0),
    ),
    fixed={"norm.kind": "layernorm", "feedforward.kind": "mlp"},
    defaults={"num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True},
)
LLAMAS = (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, GEMMA2, PHI3, STABLELM, STARCODER2)
