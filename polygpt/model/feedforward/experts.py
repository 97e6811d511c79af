"""Experts: many feed-forwards of one shape, each with its own weights, for the rows that are routed to it."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated

from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, PositiveInt

from polygpt.kernels import expert_matmul, send_back, send_to_experts
from polygpt.model.feedforward.activations import ACTIVATIONS, Activation
from polygpt.model.parts import FeedForwardConfig, Initializer


class ExpertsConfig(FeedForwardConfig):
    """Feed-forwards of which each token uses a few.

    Attributes:
        mlp_dim: hidden size F of one expert.
        num_experts: E.
        activation: of the hidden units.
        gated: experts are gated linear units (like `glu`); otherwise plain (like `mlp`).
        bias: of every matrix of an expert.
    """

    mlp_dim: PositiveInt
    num_experts: Annotated[int, Field(ge=1, le=4096)]
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False


class Experts(nnx.Module):
    """The weights of E experts; base of the parts that have experts."""

    per_expert = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")

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
        """Each block of rows through its expert: `expert[j]` (ascending), one of the device's own, or j itself."""

        def product(x: Array, weight: nnx.Param, bias: nnx.Param | None) -> Array:
            y = expert_matmul(x, weight[...], expert)
            if bias is None:
                return y
            own = bias[...] if expert is None else bias[...][expert]
            return y + own[:, None].astype(x.dtype)

        rows = send_to_experts(rows) if expert is None else rows
        hidden = product(rows, self.up, self.up_bias)
        if self.gate is None:
            hidden = self.activation(hidden)
        else:
            hidden = self.activation(product(rows, self.gate, self.gate_bias)) * hidden
        served = product(hidden, self.down, self.down_bias)
        return send_back(served) if expert is None else served
