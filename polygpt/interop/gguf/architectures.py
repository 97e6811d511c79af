"""What llama.cpp's architectures `llama` and `gpt2` are to us: tables of names, and metadata read into ours and back.

The keys are those of github.com/ggml-org/ggml, docs/gguf.md; what they leave open is as in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from polygpt.interop.gguf.rope import read_rope, write_rope
from polygpt.interop.names import Layout, NameTable
from polygpt.interop.settings import Settings
from polygpt.interop.weights import TensorInfo
from polygpt.model import ModelConfig

Fields = dict[str, Any]
Extras = Mapping[str, np.ndarray]  # small tensors that are no weights
ROPE_FREQS = "rope_freqs.weight"
_LAYER = "blk.{layer}."
_NORM_ROWS = {"output_norm": "final_norm", f"{_LAYER}attn_norm": "blocks.attention_norm"}
_NORM_ROWS |= {f"{_LAYER}ffn_norm": "blocks.feedforward_norm"}


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp's.

    Attributes:
        name: as `general.architecture` names it.
        names: foreign tensor -> our parameters.
        layout: how tensors are stored.
        read: settings, tensors and extras -> the fields of a `ModelConfig`.
        write: a `ModelConfig` -> settings and extras, as nearly as this architecture can say it.
        zero_biases: it has biases everywhere; a model without some is written with zeros in their place.
    """

    name: str
    names: NameTable
    layout: Layout
    read: Callable[[Settings, Mapping[str, TensorInfo], Extras], Fields]
    write: Callable[[ModelConfig], tuple[dict[str, Any], dict[str, np.ndarray]]]
    zero_biases: bool = False


def _affine(theirs: str, ours: str) -> dict[str, str]:
    """A matrix and its bias."""
    return {f"{_LAYER}{theirs}.weight": f"blocks.{ours}", f"{_LAYER}{theirs}.bias": f"blocks.{ours}_bias"}


_TABLES = {"token_embd.weight": "embedding", "output.weight": "head"}
_NORMS = {f"{theirs}.weight": f"{ours}.gain" for theirs, ours in _NORM_ROWS.items()}
_NORM_BIASES = {f"{theirs}.bias": f"{ours}.bias" for theirs, ours in _NORM_ROWS.items()}
_ATTENTION = {
    **_affine("attn_q", "attention.query"),
    **_affine("attn_k", "attention.key"),
    **_affine("attn_v", "attention.value"),
    **_affine("attn_output", "attention.out"),
}
_GLU = {
    **_affine("ffn_gate", "feedforward.gate"),
    **_affine("ffn_up", "feedforward.up"),
    **_affine("ffn_down", "feedforward.down"),
}
# As older files name them. Newer ones stack a layer's experts: `experts.py` cuts and stacks.
_EXPERTS = {
    f"{_LAYER}ffn_gate_inp.weight": "blocks.feedforward.router",
    **{f"{_LAYER}ffn_{part}.{{expert}}.weight": f"blocks.feedforward.{part}" for part in ("gate", "up", "down")},
}
_INTERLEAVED = Layout(
    interleaved=frozenset(f"blocks.attention.{name}" for name in ("query", "query_bias", "key", "key_bias"))
)
_GPT2 = {
    **_TABLES,
    "position_embd.weight": "position.table",
    **_NORMS,
    **_NORM_BIASES,
    f"{_LAYER}attn_qkv.weight": tuple(f"blocks.attention.{part}" for part in ("query", "key", "value")),
    f"{_LAYER}attn_qkv.bias": tuple(f"blocks.attention.{part}_bias" for part in ("query", "key", "value")),
    **_affine("attn_output", "attention.out"),
    **_affine("ffn_up", "feedforward.up"),
    **_affine("ffn_down", "feedforward.down"),
}


def _one(settings: Settings, name: str, default: int | None = None) -> int:
    """A whole number; where the file gives one for each layer, they must be the same.

    Raises:
        RequestError: they differ, or it is missing and has no default.
    """
    value = settings.get(name)
    if isinstance(value, list) and value:
        if any(entry != value[0] for entry in value):
            raise settings.error(f"'{name}' differs from layer to layer, which is not known here")
        settings.values[name] = value[0]
    return settings.take(name, int) if default is None else settings.take(name, int, default)


def _shared(settings: Settings, tensors: Mapping[str, TensorInfo]) -> Fields:
    """What both architectures say alike. The vocabulary is that of the embedding: its key is left out or is wrong
    in many files, and llama.cpp does not look at it where there are tokens."""
    settings.ignore("vocab_size")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise settings.error("the tensor token_embd.weight is missing or no matrix")
    return {
        "vocab_size": embedding.shape[0],
        "context_length": settings.take("context_length", int),
        "embed_dim": settings.take("embedding_length", int),
        "num_layers": settings.take("block_count", int),
        "head": "untied" if "output.weight" in tensors else "tied",
    }


def _read_llama(settings: Settings, tensors: Mapping[str, TensorInfo], extras: Extras) -> Fields:
    fields = _shared(settings, tensors)
    settings.ignore("tensor_data_layout")  # all of them are turned for interleaved pairs
    settings.require("attention.causal", True, "a model that sees the future cannot generate")
    heads = _one(settings, "attention.head_count")
    if heads < 1:
        raise settings.error(f"'attention.head_count' is {heads}; at least 1 is needed")
    attention: Fields = {
        "kind": "softmax",
        "num_heads": heads,
        "num_kv_heads": _one(settings, "attention.head_count_kv", heads),
        "bias": _attention_bias(tensors),
    }
    own = fields["embed_dim"] // heads
    size = settings.take("attention.key_length", int, own)
    settings.require("attention.value_length", size, "values of another size than keys are not known here")
    settings.require("rope.dimension_count", size, f"this architecture turns whole heads, of {size}")
    if size * heads != fields["embed_dim"]:
        attention["head_dim"] = size
    window = settings.take("attention.sliding_window", int, None)
    if window is not None and window < fields["context_length"]:
        raise settings.error(f"'attention.sliding_window' is {window}, which llama.cpp passes over here: unclear")
    return fields | {
        "position": read_rope(settings, size, fields["context_length"], extras.get(ROPE_FREQS)),
        "norm": {"kind": "rmsnorm", "eps": settings.take("attention.layer_norm_rms_epsilon", float)},
        "attention": attention,
        "feedforward": _feedforward(settings, tensors),
    }


def _attention_bias(tensors: Mapping[str, TensorInfo]) -> bool | str:
    if "blk.0.attn_q.bias" not in tensors:
        return False
    return True if "blk.0.attn_output.bias" in tensors else "qkv"


def _feedforward(settings: Settings, tensors: Mapping[str, TensorInfo]) -> Fields:
    hidden = _one(settings, "feed_forward_length")
    experts = settings.take("expert_count", int, 0)
    used = settings.take("expert_used_count", int, 0)
    if not experts:
        return {"kind": "glu", "mlp_dim": hidden, "activation": "silu", "bias": "blk.0.ffn_up.bias" in tensors}
    settings.require("expert_shared_count", 0, "experts that serve every token are not known here")
    return {
        "kind": "moe",
        "mlp_dim": hidden,
        "activation": "silu",
        "num_experts": experts,
        "top_k": used,
        "normalize_weights": True,
        "dispatch": "dropless",
    }


def _write_shared(model: ModelConfig) -> Fields:
    attention, feedforward = model.layers[0].attention, model.layers[0].feedforward
    return {
        "context_length": model.context_length,
        "embedding_length": model.width,
        "block_count": model.num_layers,
        "vocab_size": model.vocab_size - model.vocab_padding,
        "feed_forward_length": getattr(feedforward, "mlp_dim", 1),
        "attention.head_count": getattr(attention, "num_heads", 1),
    }


def _write_llama(model: ModelConfig) -> tuple[Fields, dict[str, np.ndarray]]:
    layer = model.layers[0]
    settings = _write_shared(model)
    size = layer.attention.size(model) if hasattr(layer.attention, "num_heads") else model.width
    settings |= {
        "attention.head_count_kv": getattr(layer.attention, "kv_heads", 1),
        "attention.layer_norm_rms_epsilon": getattr(layer.norm, "eps", 1e-5),
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
    }
    if hasattr(layer.feedforward, "num_experts"):
        used = getattr(layer.feedforward, "top_k", 1)
        settings |= {"expert_count": layer.feedforward.num_experts, "expert_used_count": used}
    rope, factors = write_rope(model, size)
    return settings | rope, {} if factors is None else {ROPE_FREQS: factors}


def _read_gpt2(settings: Settings, tensors: Mapping[str, TensorInfo], extras: Extras) -> Fields:
    fields = _shared(settings, tensors)
    heads = _one(settings, "attention.head_count")
    if _one(settings, "attention.head_count_kv", heads) != heads:
        raise settings.error("'attention.head_count_kv' differs from attention.head_count; this architecture has one")
    return fields | {
        "position": {"kind": "learned"},
        "norm": {"kind": "layernorm", "eps": settings.take("attention.layer_norm_epsilon", float)},
        "attention": {"kind": "softmax", "num_heads": heads, "bias": True},
        "feedforward": {"kind": "mlp", "mlp_dim": _one(settings, "feed_forward_length"), "activation": "gelu"},
    }


def _write_gpt2(model: ModelConfig) -> tuple[Fields, dict[str, np.ndarray]]:
    eps = getattr(model.layers[0].norm, "eps", 1e-5)
    return _write_shared(model) | {"attention.layer_norm_epsilon": eps}, {}


LLAMA = Architecture("llama", _TABLES | _NORMS | _ATTENTION | _GLU, _INTERLEAVED, _read_llama, _write_llama)
# Mixtral's files call themselves llama, too.
LLAMA_EXPERTS = Architecture("llama", _TABLES | _NORMS | _ATTENTION | _EXPERTS, _INTERLEAVED, _read_llama, _write_llama)
GPT2 = Architecture("gpt2", _GPT2, Layout(), _read_gpt2, _write_gpt2, zero_biases=True)
ARCHITECTURES = (LLAMA, LLAMA_EXPERTS, GPT2)
