"""Feed-forwards transform each token by itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from polygpt.spec.embedding import Places
from polygpt.spec.named import Named, Params, affine, elementwise

ACTIVATION = {
    # x·Φ(x), Φ the normal distribution's, approximated by tanh or exact (Hendrycks & Gimpel 2016, section 2).
    "gelu": lambda x: 0.5 * x * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: x * jax.scipy.stats.norm.cdf(x),
    "relu": lambda x: jnp.where(x > 0, x, 0),
    "relu2": lambda x: jnp.where(x > 0, x, 0) ** 2,
    "silu": lambda x: x / (1 + jnp.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + jnp.exp(-x)),
    "tanh": jnp.tanh,
}


def plain(activation: str, params: Params, x: Named) -> Named:
    """act(x·W_up + b_up)·W_down + b_down (Vaswani et al. 2017, eq. 2)."""
    hidden = elementwise(ACTIVATION[activation])(affine(x, params, "up", "embed"))
    return affine(hidden, params, "down", "mlp")


def gated(activation: str, params: Params, x: Named) -> Named:
    """(act(x·W_gate + b_gate) ⊙ (x·W_up + b_up))·W_down + b_down (Shazeer 2020, eq. 5-6)."""
    gate = elementwise(ACTIVATION[activation])(affine(x, params, "gate", "embed"))
    return affine(gate * affine(x, params, "up", "embed"), params, "down", "mlp")


def mlp(config: Any, params: Params, x: Named, at: Places, training: bool) -> tuple[Named, dict[str, Named]]:
    """`plain`; there are no auxiliary losses."""
    return plain(config.activation, params, x), {}


def glu(config: Any, params: Params, x: Named, at: Places, training: bool) -> tuple[Named, dict[str, Named]]:
    """`gated`; there are no auxiliary losses."""
    return gated(config.activation, params, x), {}


def experts(config: Any, params: Params, x: Named) -> Named:
    """Every expert applied to x: their weights have one more axis, `expert`, and so has the result."""
    return (gated if config.gated else plain)(config.activation, params, x)
