"""Hugging Face's architectures: which tensors hold our parameters, and which settings state our configuration.

GPT-2 stands alone; the others vary Llama.
"""

from __future__ import annotations

from typing import Any

from polygpt.interop.architecture import (
    Architecture,
    Fields,
    Heads,
    Rule,
    Setting,
    SettingRule,
    flag,
    required,
    written,
)
from polygpt.interop.huggingface.rules import Activation, LayerWindows, Rope
from polygpt.interop.names import Layout, NameTable, affine
from polygpt.interop.settings import Settings

# --- GPT-2: fused projections stored [in, out] (its Conv1D), biases everywhere, learned positions ----------------

_TIED = flag("tie_word_embeddings", "head", true="tied", false="untied")
_ATTENTION = tuple(f"blocks.attention.{part}" for part in ("query", "key", "value"))
_H = "transformer.h.{layer}."

GPT2 = Architecture(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    prefix="transformer.",
    names={
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "position.table",
        **affine(f"{_H}ln_1", "blocks.attention_norm.gain", "blocks.attention_norm.bias"),
        **affine(f"{_H}attn.c_attn", _ATTENTION),
        **affine(f"{_H}attn.c_proj", "blocks.attention.out"),
        **affine(f"{_H}ln_2", "blocks.feedforward_norm.gain", "blocks.feedforward_norm.bias"),
        **affine(f"{_H}mlp.c_fc", "blocks.feedforward.up"),
        **affine(f"{_H}mlp.c_proj", "blocks.feedforward.down"),
        **affine("transformer.ln_f", "final_norm.gain", "final_norm.bias"),
        "lm_head.weight": "head",
    },
    settings=(
        required("scale_attn_weights", True, "attention without its scale is not supported"),
        required("scale_attn_by_inverse_layer_idx", False, "a scale that differs by layer is not supported"),
        required("add_cross_attention", False, "cross attention is not supported"),
        Setting("vocab_size", "vocab_size"),
        _TIED,
        Setting("n_positions", "context_length", int, 1024),
        Setting("n_embd", "embed_dim", int, 768),
        Setting("n_layer", "num_layers", int, 12),
        Setting("n_head", "attention.num_heads", int, 12),
        Setting("n_inner", "feedforward.mlp_dim", int, lambda fields: 4 * fields["embed_dim"]),
        Activation("activation_function", "gelu_new"),
        Setting("layer_norm_epsilon", "norm.eps", float, 1e-5),
        Setting("attn_pdrop", "attention.dropout", float, 0.1),
        Setting("resid_pdrop", "dropout", float, 0.1),
        Setting("embd_pdrop", "embed_dropout", float, 0.1),
        written("initializer_range", "init_std"),
    ),
    fixed={
        "position.kind": "learned",
        "norm.kind": "layernorm",
        "attention.kind": "softmax",
        "attention.bias": True,
        "feedforward.kind": "mlp",
    },
    defaults={"tie_word_embeddings": True},
    layout=Layout(inputs_first=r".*\.(c_attn|c_proj|c_fc)\.weight"),
    ignored=r".*\.attn\.(bias|masked_bias)",  # the causal mask
    zero_biases=True,
)

# --- Llama and its variants ---------------------------------------------------------------------------------------

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
    _TIED,
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


def _variant(
    name: str, model_type: str, names: NameTable, settings: tuple[SettingRule, ...], fixed: dict, **defaults: Any
) -> Architecture:
    """An architecture whose tensors are called as Llama's are, with the fields that differ from Llama's."""
    llama = {"attention.kind": "softmax", "norm.kind": "rmsnorm", "feedforward.kind": "glu"}
    ignored = r".*rotary_emb\.inv_freq"  # which older checkpoints of some carry along
    return Architecture(
        name, names, settings, llama | fixed, defaults, ignored=ignored, model_type=model_type, prefix="model."
    )


LLAMA = _variant(
    "LlamaForCausalLM",
    "llama",
    _NAMES,
    (*_BASE, _ATTENTION_BIAS, flag("mlp_bias", "feedforward.bias")),
    {},
    max_position_embeddings=2048,
)
MISTRAL = _variant(
    "MistralForCausalLM",
    "mistral",
    _NAMES,
    (*_BASE, _WINDOW),
    {},
    num_key_value_heads=8,
    max_position_embeddings=131072,
    sliding_window=4096,
)
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
QWEN2 = _variant(
    "Qwen2ForCausalLM",
    "qwen2",
    _NAMES,
    (*_SHARED, _HEADS_BY_WIDTH, Rope(), _SILU, _RMS_NORM, LayerWindows(switched=True)),
    {"attention.bias": "qkv"},
    **_QWEN,
)
QWEN3 = _variant(
    "Qwen3ForCausalLM",
    "qwen3",
    {
        **_NAMES,
        f"{_L}self_attn.q_norm.weight": "blocks.attention.query_norm",
        f"{_L}self_attn.k_norm.weight": "blocks.attention.key_norm",
    },
    (_QK_NORM_EPS, *_BASE, _ATTENTION_BIAS, LayerWindows(switched=True)),
    {"attention.qk_norm": True},
    **_QWEN,
    head_dim=128,
)
MIXTRAL = _variant(
    "MixtralForCausalLM",
    "mixtral",
    {
        **_EMBEDDING,
        **_PROJECTIONS,
        f"{_L}block_sparse_moe.gate.weight": "blocks.feedforward.router",
        f"{_L}block_sparse_moe.experts.{{expert}}.w1.weight": "blocks.feedforward.gate",
        f"{_L}block_sparse_moe.experts.{{expert}}.w3.weight": "blocks.feedforward.up",
        f"{_L}block_sparse_moe.experts.{{expert}}.w2.weight": "blocks.feedforward.down",
    },
    (
        *_BASE,
        _WINDOW,
        Setting("num_local_experts", "feedforward.num_experts", int, 8),
        Setting("num_experts_per_tok", "feedforward.top_k", int, 2),
        Setting("router_aux_loss_coef", "feedforward.load_balance_loss", float, 1e-3),
        Setting("router_jitter_noise", "feedforward.router_noise", float, 0.0),
    ),
    {
        "feedforward.kind": "moe",
        "feedforward.normalize_weights": True,
        "feedforward.dispatch": "dropless",
        "feedforward.z_loss": 0.0,
    },
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rope_theta=1e6,
    rms_norm_eps=1e-5,
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
    "Gemma2ForCausalLM",
    "gemma2",
    {
        **_NAMES,
        f"{_L}post_attention_layernorm.weight": "blocks.attention_out_norm.gain",
        f"{_L}pre_feedforward_layernorm.weight": "blocks.feedforward_norm.gain",
        f"{_L}post_feedforward_layernorm.weight": "blocks.feedforward_out_norm.gain",
    },
    (
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
    {"norm.unit_offset": True, "block.kind": "sandwich", "embed_scale": "sqrt"},
    num_key_value_heads=4,
    head_dim=256,
    max_position_embeddings=8192,
    sliding_window=4096,
    query_pre_attn_scalar=256,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    tie_word_embeddings=True,
)
PHI3 = _variant(
    "Phi3ForCausalLM",
    "phi3",
    {
        **_EMBEDDING,
        f"{_L}input_layernorm.weight": "blocks.attention_norm.gain",
        f"{_L}self_attn.qkv_proj.weight": _ATTENTION,
        f"{_L}self_attn.o_proj.weight": "blocks.attention.out",
        f"{_L}post_attention_layernorm.weight": "blocks.feedforward_norm.gain",
        f"{_L}mlp.gate_up_proj.weight": ("blocks.feedforward.gate", "blocks.feedforward.up"),
        f"{_L}mlp.down_proj.weight": "blocks.feedforward.down",
    },
    (
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
    {},
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)
STABLELM = _variant(
    "StableLmForCausalLM",
    "stablelm",
    _NAMES | _NORM_BIASES,
    (
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
    {"norm.kind": "layernorm"},
    num_key_value_heads=32,
    max_position_embeddings=4096,
    partial_rotary_factor=0.25,
)
STARCODER2 = _variant(
    "Starcoder2ForCausalLM",
    "starcoder2",
    {
        **_EMBEDDING,
        **_PROJECTIONS,
        **_NORM_BIASES,
        **affine(f"{_L}mlp.c_fc", "blocks.feedforward.up"),
        **affine(f"{_L}mlp.c_proj", "blocks.feedforward.down"),
    },
    (
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
    {"norm.kind": "layernorm", "feedforward.kind": "mlp"},
    num_key_value_heads=2,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)
ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, GEMMA2, PHI3, STABLELM, STARCODER2)
}
