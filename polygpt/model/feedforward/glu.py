"""`glu`: (act(x·W_gate) ⊙ x·W_up)·W_down, a gated linear unit (Shazeer 2020, eq. 6; SwiGLU with silu)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from flax import nnx
from jaxtyping import Array, Float
from pydantic import PositiveInt

from polygpt.model.feedforward.activations import ACTIVATIONS, Activation
from polygpt.model.parts import NO_EFFECTS, Context, Effects, FeedForwardConfig, Initializer, dense, dense_each

if TYPE_CHECKING:
    from polygpt.model.config import ModelConfig


class GLUConfig(FeedForwardConfig):
    """A gated feed-forward of three matrices; `mlp_dim` is the hidden size F."""

    kind: Literal["glu"] = "glu"
    mlp_dim: PositiveInt
    activation: Activation = "silu"
    bias: bool = False

    def build(self, model: ModelConfig, init: Initializer) -> GLU:
        return GLU(self, model.width, init)


class GLU(nnx.Module):
    def __init__(self, config: GLUConfig, width: int, init: Initializer):
        hidden = config.mlp_dim
        self.activation = config.activation
        self.gate = init.weight((width, hidden), ("embed", "mlp"))
        self.up = init.weight((width, hidden), ("embed", "mlp"))
        self.down = init.weight((hidden, width), ("mlp", "embed"), residual=True)
        self.gate_bias = init.constant(0.0, (hidden,), ("mlp",)) if config.bias else None
        self.up_bias = init.constant(0.0, (hidden,), ("mlp",)) if config.bias else None
        self.down_bias = init.constant(0.0, (width,), ("embed",)) if config.bias else None

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, state: None = None
    ) -> tuple[Float[Array, "B T D"], None, Effects]:
        gate, up = dense_each(x, (self.gate, self.gate_bias), (self.up, self.up_bias))
        hidden = ACTIVATIONS[self.activation](gate) * up
        return dense(hidden, self.down, self.down_bias), None, NO_EFFECTS
