"""What a configuration computes, whatever the words: whether two are the same model, and who else has one like it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from polygpt.errors import RequestError
from polygpt.interop.biases import with_biases
from polygpt.model import LayerConfig, ModelConfig

# Of training, of this machine, or resolved below.
_WITHOUT_EFFECT = {
    "attention": {"dropout", "implementation", "num_kv_heads", "head_dim", "scale", "window"},
    "feedforward": {
        "dispatch",
        "capacity_factor",
        "claim_order",
        "load_balance_loss",
        "z_loss",
        "router_noise",
    },
}


def computation(config: ModelConfig) -> dict[str, Any]:
    """Everything that decides the logits of a model in evaluation, with defaults written out; one object a layer."""
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


def _layer(layer: LayerConfig, model: ModelConfig) -> dict[str, Any]:
    parts = {name: getattr(layer, name).to_dict() for name in ("block", "attention", "feedforward", "norm")}
    for name, keys in _WITHOUT_EFFECT.items():
        parts[name] = {key: value for key, value in parts[name].items() if key not in keys}
    attention = layer.attention
    if attention.kind in ("softmax", "local"):
        rule = attention.rule(model)
        # A window is asked for by either kind; a scale may have been written as a power of a whole number.
        parts["attention"] |= {"kind": "softmax", "window": rule.window, "scale": float(f"{rule.scale:.9g}")}
        if not attention.qk_norm:
            parts["attention"].pop("qk_norm_eps")
    if hasattr(attention, "num_heads"):
        parts["attention"] |= {"num_kv_heads": attention.kv_heads, "head_dim": attention.size(model)}
    return parts


def differences(ours: Any, theirs: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Where two computations differ: dotted key and both values. Of a part of another kind, the kind alone.

    A difference that all layers share is named once.
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
        return []  # a file may hold 1e-5 in 32 bits
    return [] if ours == theirs else [(key, ours, theirs)]


class Candidate(Protocol):
    """An architecture of other people's; with `zero_biases`, one that has biases everywhere."""

    name: str
    zero_biases: bool


A = TypeVar("A", bound=Candidate)


def counterpart(
    config: ModelConfig,
    candidates: Iterable[A],
    read_back: Callable[[A, ModelConfig], dict[str, Any] | None],
    refusal: str,
) -> A:
    """The candidate that computes what `config` does.

    Args:
        config: the model.
        candidates: architectures, the preferred first.
        read_back: the `computation` of the configuration that a candidate writes for a model, read again; None where
            it cannot be written at all.
        refusal: how the error begins.

    Raises:
        RequestError: there is none; what the nearest lacks is named.
    """
    nearest, reason = math.inf, "none is near"
    for candidate in candidates:
        full = with_biases(config) if candidate.zero_biases else config
        found = read_back(candidate, full)
        if found is None:
            continue
        differing = differences(computation(full), found)
        if not differing:
            return candidate
        key, ours, theirs = differing[0]
        # A part of another kind may differ in everything: it counts for several settings.
        distance = sum(5 if key.endswith(".kind") else 1 for key, *_ in differing)
        if distance < nearest:
            nearest = distance
            reason = f"{key}={ours} has no counterpart; {candidate.name}, the nearest, has {theirs}"
    raise RequestError(f"{refusal}: {reason}")
