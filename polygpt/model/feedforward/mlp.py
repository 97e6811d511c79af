"""`mlp`: act(x·W_up + b_up)·W_down + b_down (Vaswani et al. 2017, eq. 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from flax import nnx
from jaxtyping import Array, Float
from pydantic import PositiveInt

from polygpt.model.feedforward.activations import ACTIVATIONS, Activation
from polygpt.model.parts import NO_EFFECTS, Context, Effects, FeedForwardConfig, Initializer, dense

if TYPE_CHECKING:
    from polygpt.model.config import ModelConfig


class MLPConfig(FeedForwardConfig):
    """A feed-forward of two matrices; `mlp_dim` is the hidden size F."""

    kind: Literal["mlp"] = "mlp"
    mlp_dim: PositiveInt
    activation: Activation = "gelu"
    bias: bool = True

    def build(self, model: ModelConfig, init: Initializer) -> MLP:
        return MLP(self, model.width, init)


class MLP(nnx.Module):
    def __init__(self, config: MLPConfig, width: int, init: Initializer):
        hidden = config.mlp_dim
        self.activation = config.activation
        self.up = init.weight((width, hidden), ("embed", "mlp"))
        self.up_bias = init.constant(0.0, (hidden,), ("mlp",)) if config.bias else None
        self.down = init.weight((hidden, width), ("mlp", "embed"), residual=True)
        self.down_bias = init.constant(0.0, (width,), ("embed",)) if config.bias else None

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, state: None = None
    ) -> tuple[Float[Array, "B T D"], None, Effects]:
        hidden = ACTIVATIONS[self.activation](dense(x, self.up, self.up_bias))
        return dense(hidden, self.down, self.down_bias), None, NO_EFFECTS
