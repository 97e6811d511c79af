"""What a configuration computes, however it is written, and where two configurations differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from polygpt.model import LayerConfig, ModelConfig, architecture


def computation(config: ModelConfig) -> dict[str, Any]:
    """Everything that decides the logits of a model in evaluation, defaults written out; one object per layer."""
    return {
        "vocab_size": config.vocab_size - config.vocab_padding,
        "context_length": config.context_length,
        "embed_dim": config.width,
        "num_layers": config.num_layers,
        "position": config.position.to_dict(),
        "layers": [_layer(layer, config) for layer in config.layers],
        "final_norm": config.norm.to_dict() if config.final_norm else None,
        "head": config.head,
        "embed_scale": config.width**0.5 if config.embed_scale == "sqrt" else float(config.embed_scale),
        "logit_softcap": config.logit_softcap,
    }


def resolved_parts(
    layer: LayerConfig, model: ModelConfig, fields: Callable[[Any], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The `fields` of each part of a layer; those of its attention that follow from others are filled in."""
    parts = {name: fields(getattr(layer, name)) for name in ("block", "attention", "feedforward", "norm")}
    attention = layer.attention
    if hasattr(attention, "num_heads"):
        parts["attention"] |= {"num_kv_heads": attention.kv_heads, "head_dim": attention.head_size(model)}
    if hasattr(attention, "rule"):
        parts["attention"]["scale"] = attention.rule(model).scale
    return parts


def _layer(layer: LayerConfig, model: ModelConfig) -> dict[str, Any]:
    parts = resolved_parts(layer, model, architecture)
    attention = parts["attention"]
    if attention["kind"] in ("softmax", "local"):
        # Either kind can have a window. An imported scale may be a rounded power of an integer.
        window, scale = layer.attention.rule(model).window, float(f"{attention['scale']:.9g}")
        attention |= {"kind": "softmax", "window": window, "scale": scale}
        if not attention["qk_norm"]:
            del attention["qk_norm_eps"]
    return parts


def differences(ours: Any, theirs: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Where two computations differ: the dotted key and both values. For parts of different kinds, the kind alone.

    A difference that all layers share is listed once.
    """
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.get("kind") != theirs.get("kind"):
            return [(f"{key}.kind", ours.get("kind"), theirs.get("kind"))]
        names = [name for name in ours if name in theirs] + sorted(ours.keys() ^ theirs.keys())
        return [
            found
            for name in names
            for found in differences(ours.get(name), theirs.get(name), f"{key}.{name}".removeprefix("."))
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        found = [entry for mine, other in zip(ours, theirs, strict=True) for entry in differences(mine, other, "")]
        return list({repr(entry): entry for entry in found}.values())
    if isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs, rel_tol=1e-6):
        return []  # a file may hold 1e-5 as float32
    return [] if ours == theirs else [(key, ours, theirs)]
