"""GPT-2: fused projections stored [in, out] (its Conv1D), biases everywhere, learned positions."""

from __future__ import annotations

from typing import Any

from polygpt.interop.huggingface.families import (
    Family,
    activation,
    foreign_activation,
    shared_fields,
    shared_settings,
)
from polygpt.interop.names import Layout
from polygpt.interop.settings import Settings
from polygpt.model import ModelConfig

_LAYER = "transformer.h.{layer}."
_NAMES: dict[str, str | tuple[str, ...]] = {
    "transformer.wte.weight": "embedding",
    "transformer.wpe.weight": "position.table",
    f"{_LAYER}ln_1.weight": "blocks.attention_norm.gain",
    f"{_LAYER}ln_1.bias": "blocks.attention_norm.bias",
    f"{_LAYER}attn.c_attn.weight": tuple(f"blocks.attention.{part}" for part in ("query", "key", "value")),
    f"{_LAYER}attn.c_attn.bias": tuple(f"blocks.attention.{part}_bias" for part in ("query", "key", "value")),
    f"{_LAYER}attn.c_proj.weight": "blocks.attention.out",
    f"{_LAYER}attn.c_proj.bias": "blocks.attention.out_bias",
    f"{_LAYER}ln_2.weight": "blocks.feedforward_norm.gain",
    f"{_LAYER}ln_2.bias": "blocks.feedforward_norm.bias",
    f"{_LAYER}mlp.c_fc.weight": "blocks.feedforward.up",
    f"{_LAYER}mlp.c_fc.bias": "blocks.feedforward.up_bias",
    f"{_LAYER}mlp.c_proj.weight": "blocks.feedforward.down",
    f"{_LAYER}mlp.c_proj.bias": "blocks.feedforward.down_bias",
    "transformer.ln_f.weight": "final_norm.gain",
    "transformer.ln_f.bias": "final_norm.bias",
    "lm_head.weight": "head",
}


def _read(settings: Settings) -> dict[str, Any]:
    width, heads = settings.take("n_embd", int, 768), settings.take("n_head", int, 12)
    settings.require("scale_attn_weights", True, "attention without its scale is not known here")
    settings.require("scale_attn_by_inverse_layer_idx", False, "a scale that differs by layer is not known here")
    settings.require("add_cross_attention", False, "there is nothing to attend to across")
    # Of the summary head, which no language model has, and what conversion tools have left in small test models.
    settings.ignore("reorder_and_upcast_attn", "n_ctx", *(name for name in settings.values if name[:8] == "summary_"))
    settings.ignore("type", "decoder", "past_names", "present_names", "hidden_size", "intermediate_size", "hidden_act")
    settings.ignore("attention_probs_dropout_prob", "hidden_dropout_prob", "type_vocab_size")
    return shared_fields(settings) | {
        "context_length": settings.take("n_positions", int, 1024),
        "embed_dim": width,
        "num_layers": settings.take("n_layer", int, 12),
        "position": {"kind": "learned"},
        "norm": {"kind": "layernorm", "eps": settings.take("layer_norm_epsilon", float, 1e-5)},
        "attention": {
            "kind": "softmax",
            "num_heads": heads,
            "bias": True,
            "dropout": settings.take("attn_pdrop", float, 0.1),
        },
        "feedforward": {
            "kind": "mlp",
            "mlp_dim": settings.take("n_inner", int, 4 * width),
            "activation": activation(settings, "activation_function", default="gelu_new"),
        },
        "dropout": settings.take("resid_pdrop", float, 0.1),
        "embed_dropout": settings.take("embd_pdrop", float, 0.1),
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    layer = model.layers[0]
    return {
        **shared_settings(model),
        "n_embd": model.width,
        "n_layer": model.num_layers,
        "n_head": getattr(layer.attention, "num_heads", 1),
        "n_positions": model.context_length,
        "n_inner": getattr(layer.feedforward, "mlp_dim", 1),
        "activation_function": foreign_activation(getattr(layer.feedforward, "activation", "gelu")),
        "layer_norm_epsilon": getattr(layer.norm, "eps", 1e-5),
        "attn_pdrop": getattr(layer.attention, "dropout", 0.0),
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.embed_dropout,
        "initializer_range": model.init_std,
    }


GPT2 = Family(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    names=_NAMES,
    prefix="transformer.",
    read=_read,
    write=_write,
    defaults={"tie_word_embeddings": True},
    layout=Layout(inputs_first=r".*\.(c_attn|c_proj|c_fc)\.weight"),
    ignored=r".*\.attn\.(bias|masked_bias)",  # the causal mask
    zero_biases=True,
)
