"""Rotary positions in GGUF's settings: a base, a scaling, and for Llama 3 a tensor of factors."""

from __future__ import annotations

from typing import Any

import numpy as np

from polygpt.interop.architecture import Fields
from polygpt.settings import Settings

FACTORS = "tensors.rope_freqs"  # a pseudo-setting (see `architectures.py`): float32 [H/2], or None
_LLAMA3_CONTEXT = 8192  # Llama 3's before it was extended
_LLAMA3 = ("original_context_length", "low_freq_factor", "high_freq_factor")


def read_rope(settings: Settings, fields: Fields) -> None:
    """Adds the fields of our rotary position.

    Raises:
        RequestError: the scaling is unknown, or the factors are not Llama 3's.
    """
    fields["position.kind"] = "rope"
    fields["position.theta"] = theta = settings.take("rope.freq_base", float, 10000.0)
    kind = settings.take("rope.scaling.type", str, "linear")
    if kind not in ("none", "linear", "yarn"):
        raise settings.error(f"'rope.scaling.type' is {kind!r}, which is unknown; known: linear, none, yarn")
    settings.ignore("rope.scaling.finetuned")
    factor = settings.take("rope.scale_linear", float, 0.0)
    factor = settings.take("rope.scaling.factor", float, factor)
    original = settings.take("rope.scaling.original_context_length", int, 0)
    for name, neutral in (("attn_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_ext_factor", 1.0)):
        settings.require(f"rope.scaling.{name}", neutral, f"only {neutral} is supported")
    settings.require("rope.scaling.yarn_log_multiplier", 0.0, "only 0 is supported")
    betas = {
        name: settings.take(f"rope.scaling.yarn_{name}", float, default)
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    }
    scaling: dict[str, Any] | None = None
    if kind != "none" and factor not in (0.0, 1.0):
        scaling = {"kind": kind, "factor": factor}
        if kind == "yarn":
            scaling |= {"original_context_length": original or fields["context_length"], **betas}
    factors = settings.get(FACTORS)
    if factors is not None and not (factors == 1).all():
        if scaling is not None:
            raise settings.error(f"'rope.scaling.type' is {kind!r} and there is rope_freqs.weight; use only one")
        head_dim = fields.get("attention.head_dim", fields["embed_dim"] // fields["attention.num_heads"])
        scaling = _llama3(settings, theta, head_dim, original, factors)
    if scaling is not None:
        fields["position.scaling"] = scaling


def _llama3(settings: Settings, theta: float, head_dim: int, original: int, factors: np.ndarray) -> dict[str, Any]:
    """The scaling whose factors these are. The file has nothing else; Llama 3's other numbers never varied."""
    if factors.shape == (head_dim // 2,) and np.isfinite(factors).all() and factors.max() > 1:
        factor = float(factors.max())
        for length in dict.fromkeys((original or _LLAMA3_CONTEXT, _LLAMA3_CONTEXT)):
            if np.allclose(_factors(theta, head_dim, factor, length), factors, rtol=1e-5):
                return {"kind": "llama3", "factor": factor, "original_context_length": length}
    raise settings.error("rope_freqs.weight: only the factors of Llama 3's scaling are supported, and these are others")


def _factors(
    theta: float, head_dim: int, factor: float, original: int, low: float = 1.0, high: float = 4.0
) -> np.ndarray:
    """What Llama 3's scaling divides the frequencies by, [H/2] (the reference code's `apply_scaling`)."""
    with np.errstate(all="ignore"):  # for a base that no model has
        rotations = original * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
        kept = np.clip((rotations - low) / (high - low), 0, 1)
        return 1 / (kept + (1 - kept) / factor)


def write_rope(fields: Fields) -> dict[str, Any]:
    """The settings, and the factors of Llama 3's scaling; what GGUF cannot express is left out."""
    if fields["position.kind"] != "rope":
        return {}
    settings: dict[str, Any] = {"rope.freq_base": fields["position.theta"]}
    scaling = fields["position.scaling"] or {"kind": "none"}
    if scaling["kind"] == "llama3" and "attention.head_dim" in fields:
        original, low, high = (scaling[name] for name in _LLAMA3)
        factors = _factors(
            fields["position.theta"], fields["attention.head_dim"], scaling["factor"], original, low, high
        )
        settings |= {"rope.scaling.original_context_length": original, FACTORS: factors.astype(np.float32)}
    if scaling["kind"] in ("linear", "yarn"):
        settings |= {"rope.scaling.type": scaling["kind"], "rope.scaling.factor": scaling["factor"]}
    if scaling["kind"] == "yarn":
        settings["rope.scaling.original_context_length"] = scaling["original_context_length"]
        settings |= {f"rope.scaling.yarn_{name}": scaling[name] for name in ("beta_fast", "beta_slow")}
    return settings
