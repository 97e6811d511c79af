"""GPT-2: fused projections stored [in, out] (its Conv1D), biases everywhere, learned positions."""

from __future__ import annotations

from polygpt.interop.architecture import Architecture, Fields, Rule, Setting, required, written
from polygpt.interop.huggingface.rules import QUERY_KEY_VALUE, TIED, Activation
from polygpt.interop.names import Layout, affine
from polygpt.settings import Settings

_H = "transformer.h.{layer}."


def _check_other_names(settings: Settings, fields: Fields) -> None:
    """Settings that transformers knows by a second name, which would take the place of the first."""
    others = {
        "num_attention_heads": "attention.num_heads",
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "context_length",
    }
    for name, field in others.items():
        settings.require(name, fields[field], "it contradicts the setting that GPT-2 has in its place")


GPT2 = Architecture(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    prefix="transformer.",
    names={
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "position.table",
        **affine(f"{_H}ln_1", "blocks.attention_norm.gain", "blocks.attention_norm.bias"),
        **affine(f"{_H}attn.c_attn", QUERY_KEY_VALUE),
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
        Setting("vocab_size", "vocab_size"),
        TIED,
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
        Rule(_check_other_names),
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
