"""Rotary position in GGUF's words: a base, a scaling, and for Llama 3 a tensor of factors."""

from __future__ import annotations

from typing import Any

import numpy as np

from polygpt.interop.settings import Settings
from polygpt.model import ModelConfig

_LLAMA3_CONTEXT = 8192  # Llama 3's before it was stretched
_LLAMA3 = ("original_context_length", "low_freq_factor", "high_freq_factor")


def read_rope(settings: Settings, size: int, context_length: int, factors: np.ndarray | None) -> dict[str, Any]:
    """The fields of our rotary position.

    Args:
        settings: the architecture's.
        size: of a head.
        context_length: of the model, where yarn's original one is not said.
        factors: [size/2], what each pair's frequency is divided by, if the file says so.

    Raises:
        RequestError: a scaling that is not known, or factors that are not Llama 3's.
    """
    fields = {"kind": "rope", "theta": settings.take("rope.freq_base", float, 10000.0)}
    kind = settings.take("rope.scaling.type", str, "linear")
    if kind not in ("none", "linear", "yarn"):
        raise settings.error(f"'rope.scaling.type' is {kind!r}, which is not known; known: linear, none, yarn")
    settings.ignore("rope.scaling.finetuned")
    factor = settings.take("rope.scale_linear", float, 0.0)
    factor = settings.take("rope.scaling.factor", float, factor)
    original = settings.take("rope.scaling.original_context_length", int, 0)
    for name, neutral in (("attn_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_ext_factor", 1.0)):
        settings.require(f"rope.scaling.{name}", neutral, f"only {neutral} is known here")
    settings.require("rope.scaling.yarn_log_multiplier", 0.0, "only 0 is known here")
    betas = {
        name: settings.take(f"rope.scaling.yarn_{name}", float, default)
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    }
    if kind != "none" and factor not in (0.0, 1.0):
        fields["scaling"] = {"kind": kind, "factor": factor}
        if kind == "yarn":
            fields["scaling"] |= {"original_context_length": original or context_length, **betas}
    if factors is not None and not (factors == 1).all():
        if "scaling" in fields:
            raise settings.error(f"'rope.scaling.type' is {kind!r} and there is rope_freqs.weight; only one is known")
        fields["scaling"] = _llama3(settings, fields["theta"], size, original, factors)
    return fields


def _llama3(settings: Settings, theta: float, size: int, original: int, factors: np.ndarray) -> dict[str, Any]:
    """The scaling whose factors these are. The file has them alone; Llama 3's other numbers never varied."""
    if factors.shape == (size // 2,) and np.isfinite(factors).all() and factors.max() > 1:
        factor = float(factors.max())
        for length in dict.fromkeys((original or _LLAMA3_CONTEXT, _LLAMA3_CONTEXT)):
            if np.allclose(_factors(theta, size, factor, length), factors, rtol=1e-5):
                return {"kind": "llama3", "factor": factor, "original_context_length": length}
    raise settings.error("rope_freqs.weight: these factors are not those of Llama 3's scaling, the only one known")


def _factors(theta: float, size: int, factor: float, original: int, low: float = 1.0, high: float = 4.0) -> np.ndarray:
    """What Llama 3's scaling divides the frequencies by, [size/2] (the reference code's `apply_scaling`)."""
    with np.errstate(all="ignore"):  # of a base that no model has
        turns = original * theta ** (-np.arange(0, size, 2) / size) / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return 1 / (kept + (1 - kept) / factor)


def write_rope(model: ModelConfig, size: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """The settings, and the factors that Llama 3's scaling takes; what cannot be said is left out."""
    position = model.position
    if position.kind != "rope":
        return {}, None
    settings: dict[str, Any] = {"rope.freq_base": position.theta}
    if position.scaling is None:
        return settings, None
    scaling = position.scaling.to_dict()
    if scaling["kind"] == "llama3":
        original, low, high = (scaling[name] for name in _LLAMA3)
        settings["rope.scaling.original_context_length"] = original
        return settings, _factors(position.theta, size, scaling["factor"], original, low, high).astype(np.float32)
    if scaling["kind"] in ("linear", "yarn"):
        settings |= {"rope.scaling.type": scaling["kind"], "rope.scaling.factor": scaling["factor"]}
    if scaling["kind"] == "yarn":
        settings["rope.scaling.original_context_length"] = scaling["original_context_length"]
        settings |= {f"rope.scaling.yarn_{name}": scaling[name] for name in ("beta_fast", "beta_slow")}
    return settings, None
