"""The activations that feed-forwards choose by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from polygpt.kernels import in_float32

Activation = Literal["gelu", "gelu_exact", "relu", "relu2", "silu", "sigmoid", "tanh"]


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GPT-2's GELU: 0.5·x·(1 + tanh(u)) with u = sqrt(2/π)(x + 0.044715 x³) (Hendrycks & Gimpel 2016).

    Written as x·sigmoid(2u), which is the same function.
    """
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * jax.nn.sigmoid(2 * u)


def gelu_exact(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x·Φ(x) = 0.5·x·(1 + erf(x/√2)), Φ the normal distribution function.

    By erf: `jax.nn.gelu` takes erfc, whose two branches are both computed.
    """
    return 0.5 * x * (1 + lax.erf(x * 0.7071067811865476))


def relu2(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """max(x, 0)² (So et al. 2021)."""
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    name: in_float32(function)
    for name, function in {
        "gelu": gelu,
        "gelu_exact": gelu_exact,
        "relu": jax.nn.relu,
        "relu2": relu2,
        "silu": jax.nn.silu,
        "sigmoid": jax.nn.sigmoid,
        "tanh": jnp.tanh,
    }.items()
}
assert set(ACTIVATIONS) == set(get_args(Activation))
