"""Rotary position: queries and keys turn by angles that grow with their positions (Su et al. 2021, section 3.2).

The product of two vectors rotated by t·ω and s·ω depends only on them and on t - s: absolute rotations give
relative position. The scalings change the frequencies ω, so that a model reads longer texts than it was trained on.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from penzai import pz

from polygpt.spec.embedding import Places
from polygpt.spec.named import Named, elementwise, rename


def rope(config: Any, x: Named, at: Places) -> Named:
    """Turns the pairs (a, b) = (x_i, x_(i+R/2)) of the first R dimensions of each head, the rest is kept.

    (a, b) becomes m · (a cos pω_i - b sin pω_i, a sin pω_i + b cos pω_i), p the position (Su et al. 2021, eq. 15). R is
    the share `fraction` of the head, rounded down (Black et al. 2022). m is 1 but for YaRN.
    """
    size = int(x.named_shape["head_dim"] * config.fraction)
    omega, magnitude = frequencies(config, size)
    angle = at.position * pz.nx.wrap(jnp.asarray(omega, jnp.float32), "pair")
    cos, sin = elementwise(jnp.cos)(angle) * magnitude, elementwise(jnp.sin)(angle) * magnitude
    a = rename(x[{"head_dim": pz.slice[: size // 2]}], head_dim="pair")
    b = rename(x[{"head_dim": pz.slice[size // 2 : size]}], head_dim="pair")
    rotated = [rename(half, pair="head_dim") for half in (a * cos - b * sin, a * sin + b * cos)]
    return pz.nx.concatenate([*rotated, x[{"head_dim": pz.slice[size:]}]], "head_dim")


def frequencies(config: Any, size: int) -> tuple[np.ndarray, float]:
    """ω_i for each of the size/2 pairs, and the magnitude m. In float64: they are constants of the model."""
    if config.scaling is None:
        return plain(config.theta, size), 1.0
    return ROPE_SCALING[config.scaling.kind](config.scaling, config.theta, size)


def plain(theta: float, size: int) -> np.ndarray:
    """ω_i = theta^(-2i/R): the first pair turns fastest, one radian a position (Su et al. 2021, eq. 15)."""
    i = np.arange(size // 2)
    return theta ** (-2 * i / size)


def linear(scaling: Any, theta: float, size: int) -> tuple[np.ndarray, float]:
    """ω_i / factor: positions squeezed into the range of training (Chen et al. 2023, eq. 3)."""
    return plain(theta, size) / scaling.factor, 1.0


def ntk(scaling: Any, theta: float, size: int) -> tuple[np.ndarray, float]:
    """A larger base, theta · factor^(R/(R-2)): ω_0 stays, the slowest is divided by factor (Peng et al. 2023, def. 1).

    A single pair is the fastest, which stays.
    """
    power = size / (size - 2) if size > 2 else 0
    return plain(theta * scaling.factor**power, size), 1.0


def yarn(scaling: Any, theta: float, size: int) -> tuple[np.ndarray, float]:
    """Slow pairs squeezed, fast ones kept, a ramp over i between them (Peng et al. 2023, section 3.2-3.4).

    Pair i makes r = original · theta^(-2i/R) / 2π turns in the original context; solved for i, that tells which pair
    makes `turns` of them. m = 0.1 ln(factor) + 1, which sharpens the softmax.
    """

    def pair_that_makes(turns: float) -> float:
        return size / 2 * math.log(scaling.original_context_length / (2 * math.pi * turns)) / math.log(theta)

    first = max(math.floor(pair_that_makes(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_makes(scaling.beta_slow)), size - 1)
    ramp = np.interp(np.arange(size // 2), [first, max(last, first + 1e-3)], [0, 1])
    omega = (1 - ramp) * plain(theta, size) + ramp * plain(theta, size) / scaling.factor
    default = 0.1 * math.log(scaling.factor) + 1
    return omega, default if scaling.attention_factor is None else scaling.attention_factor


def llama3(scaling: Any, theta: float, size: int) -> tuple[np.ndarray, float]:
    """Squeezed beyond one wavelength, kept below another, mixed between them (Dubey et al. 2024; `apply_scaling`).

    With wavelength λ = 2π/ω the share that is kept is (original/λ - low) / (high - low), clipped to 0 and 1.
    """
    omega = plain(theta, size)
    wavelength = 2 * math.pi / omega
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((scaling.original_context_length / wavelength - low) / (high - low), 0, 1)
    return kept * omega + (1 - kept) * omega / scaling.factor, 1.0


ROPE_SCALING = {"linear": linear, "ntk": ntk, "yarn": yarn, "llama3": llama3}
