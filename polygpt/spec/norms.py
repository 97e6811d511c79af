"""Norms keep the hidden states at one scale, token by token."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from polygpt.spec.named import Named, Params, along, elementwise


def layernorm(config: Any, params: Params, x: Named) -> Named:
    """(x - mean) / sqrt(var + eps) · gain + bias (Ba et al. 2016, eq. 4)."""
    centred = x - along(jnp.mean, x, "embed")
    variance = along(jnp.mean, centred * centred, "embed")
    return centred / elementwise(jnp.sqrt)(variance + config.eps) * params["gain"] + params.get("bias", 0.0)


def rmsnorm(config: Any, params: Params, x: Named) -> Named:
    """x / sqrt(mean(x²) + eps) · gain (Zhang & Sennrich 2019, eq. 4); with `unit_offset` gain + 1 (Gemma Team 2024)."""
    return rms(x, "embed", config.eps) * (params["gain"] + config.unit_offset)


def rms(x: Named, name: str, eps: float) -> Named:
    """x / sqrt(mean(x²) + eps), the mean over the axis `name`."""
    return x / elementwise(jnp.sqrt)(along(jnp.mean, x * x, name) + eps)


def scalenorm(config: Any, params: Params, x: Named) -> Named:
    """gain · x / max(|x|, eps), one gain for all dimensions (Nguyen & Salazar 2019, eq. 5)."""
    length = elementwise(jnp.sqrt)(along(jnp.sum, x * x, "embed"))
    return params["gain"] * x / elementwise(lambda length: jnp.maximum(length, config.eps))(length)


def none(config: Any, params: Params, x: Named) -> Named:
    """x."""
    return x


NORM = {"layernorm": layernorm, "rmsnorm": rmsnorm, "scalenorm": scalenorm, "none": none}
