"""One layer: attention and a feed-forward around the residual stream."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float, PyTree

from polygpt.model.config import LayerConfig, ModelConfig
from polygpt.model.parts import Context, Initializer, dropout


class Block(nnx.Module):
    """Pre-norm: h = x + attention(norm(x)); y = h + feedforward(norm(h)) (Radford et al. 2019)."""

    def __init__(self, layer: LayerConfig, model: ModelConfig, init: Initializer):
        self.dropout = model.dropout
        self.attention_norm = layer.norm.build(model, init)
        self.attention = layer.attention.build(model, init)
        self.feedforward_norm = layer.norm.build(model, init)
        self.feedforward = layer.feedforward.build(model, init)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, state: PyTree | None
    ) -> tuple[Float[Array, "B T D"], PyTree | None, dict[str, Float[Array, ""]]]:
        mixed, state = self.attention(self.attention_norm(x), context.fold(0), state)
        h = x + dropout(mixed, self.dropout, context.fold(1).key)
        fed, losses = self.feedforward(self.feedforward_norm(h), context.fold(2))
        return h + dropout(fed, self.dropout, context.fold(3).key), state, losses
