"""Experts: the same feed-forward many times over, each with its own weights, for rows that were routed to it."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int
from pydantic import Field, PositiveInt

from polygpt.model.feedforward.activations import ACTIVATIONS, Activation
from polygpt.model.parts import FeedForwardConfig, Initializer


class ExpertsConfig(FeedForwardConfig):
    """Feed-forwards of which tokens use a few.

    Attributes:
        mlp_dim: hidden size F of one expert.
        num_experts: E.
        activation: of the hidden units.
        gated: experts are gated linear units (as `glu`); otherwise plain (as `mlp`).
        bias: of every matrix of an expert.
    """

    mlp_dim: PositiveInt
    num_experts: Annotated[int, Field(ge=1, le=4096)]
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False


class Experts(nnx.Module):
    """The weights of E experts. A part that has experts derives from it."""

    def __init__(self, config: ExpertsConfig, width: int, init: Initializer, active: Fraction = Fraction(1)):
        experts, hidden = config.num_experts, config.mlp_dim
        self.activation = ACTIVATIONS[config.activation]

        def weight(inputs: int, outputs: int, names: tuple[str, str], residual: bool = False) -> nnx.Param:
            axes = ("expert", *names)
            return init.weight((experts, inputs, outputs), axes, residual=residual, experts=True, active=active)

        def bias(size: int, name: str) -> nnx.Param | None:
            return init.constant(0.0, (experts, size), ("expert", name), active) if config.bias else None

        self.gate = weight(width, hidden, ("embed", "mlp")) if config.gated else None
        self.up = weight(width, hidden, ("embed", "mlp"))
        self.down = weight(hidden, width, ("mlp", "embed"), residual=True)
        self.gate_bias = bias(hidden, "mlp") if config.gated else None
        self.up_bias = bias(hidden, "mlp")
        self.down_bias = bias(width, "embed")

    def transform(self, rows: Float[Array, "J R D"], expert: Int[Array, " J"] | None = None) -> Float[Array, "J R D"]:
        """Each block of rows through its expert: `expert[j]`, in ascending order, or j itself."""

        def product(x: Array, weight: nnx.Param, bias: nnx.Param | None) -> Array:
            y = expert_matmul(x, weight[...], expert)
            if bias is None:
                return y
            own = bias[...] if expert is None else bias[...][expert]
            return y + own[:, None].astype(x.dtype)

        hidden = product(rows, self.up, self.up_bias)
        if self.gate is None:
            hidden = self.activation(hidden)
        else:
            hidden = self.activation(product(rows, self.gate, self.gate_bias)) * hidden
        return product(hidden, self.down, self.down_bias)


def expert_matmul(
    x: Float[Array, "J R D"], weight: Float[Array, "E D F"], expert: Int[Array, " J"] | None
) -> Float[Array, "J R F"]:
    """x[j] @ weight[expert[j]] for every block j, in x's dtype; without `expert`, J = E and block j is expert j's."""
    if x.shape[1] == 1 and expert is not None:  # a few rows: read (and cast) only the weights they need
        return jnp.einsum("jrd,jdf->jrf", x, weight[expert].astype(x.dtype))
    if jax.default_backend() == "cpu":
        return _looped_matmul(x, weight, jnp.arange(x.shape[0]) if expert is None else expert)
    weight = weight.astype(x.dtype)
    if expert is None:
        return jnp.einsum("erd,edf->erf", x, weight)
    sizes = jnp.bincount(expert, length=weight.shape[0]) * x.shape[1]
    flat = lax.ragged_dot(x.reshape(-1, x.shape[-1]), weight, sizes.astype(jnp.int32))
    return flat.reshape(*x.shape[:2], -1)


@jax.custom_vjp
def _looped_matmul(
    x: Float[Array, "J R D"], weight: Float[Array, "E D F"], expert: Int[Array, " J"]
) -> Float[Array, "J R F"]:
    """One product after the other, each on all cores: a CPU runs a batched product on one, and a ragged one E times."""
    return lax.map(lambda block: block[0] @ weight[block[1]].astype(x.dtype), (x, expert))


def _looped_forward(x: Array, weight: Array, expert: Array) -> tuple[Array, tuple]:
    return _looped_matmul(x, weight, expert), (x, weight, expert)


def _looped_backward(saved: tuple, d_y: Float[Array, "J R F"]) -> tuple[Array, Array, None]:
    x, weight, expert = saved

    def one(d_weight: Array, block: tuple) -> tuple[Array, Array]:
        x, index, d_y = block
        return d_weight.at[index].add((x.T @ d_y).astype(weight.dtype)), d_y @ weight[index].astype(x.dtype).T

    d_weight, d_x = lax.scan(one, jnp.zeros_like(weight), (x, expert, d_y))
    return d_x, d_weight, None


_looped_matmul.defvjp(_looped_forward, _looped_backward)
