"""One layer: attention and a feed-forward around the residual stream, and the registry of ways to arrange them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from flax import nnx
from jaxtyping import Array, Float, PyTree

from polygpt.model.parts import Context, Effects, Initializer, ModelPart, dropout

if TYPE_CHECKING:
    from polygpt.model.config import LayerConfig, ModelConfig

Hidden = Float[Array, "B T D"]
Sublayer = Callable[[Hidden], Hidden]


class LayerState(NamedTuple):
    """The decoding state of one layer: that of its attention and that of its feed-forward."""

    attention: PyTree
    feedforward: PyTree


class BlockConfig(ModelPart):
    """The slot `block`: builds a module that maps x [B, T, D] to [B, T, D], the next state, and effects."""

    def build(self, layer: LayerConfig, model: ModelConfig, init: Initializer) -> Any:
        """The NNX module of one layer, its parameters declared by `init`."""
        raise NotImplementedError


class Block(nnx.Module):
    """The two sublayers of a layer; a subclass says how they are arranged around the residual stream."""

    def __init__(self, layer: LayerConfig, model: ModelConfig, init: Initializer):
        self.dropout = model.dropout
        self.attention = layer.attention.build(model, init)
        self.feedforward = layer.feedforward.build(model, init)

    def arrange(self, x: Hidden, attention: Sublayer, feedforward: Sublayer) -> Hidden:
        """The layer's output from its input and its sublayers, each of which is called once."""
        raise NotImplementedError

    def __call__(self, x: Hidden, context: Context, state: LayerState) -> tuple[Hidden, LayerState, Effects]:
        """Runs the layer. The sublayers' states and effects are carried here, and dropout is applied."""
        after: dict[str, Any] = {}

        def attention(x: Hidden) -> Hidden:
            mixed, after["attention"] = self.attention(x, context.fold(0), state.attention)
            return dropout(mixed, self.dropout, context.fold(1).key)

        def feedforward(x: Hidden) -> Hidden:
            y, after["feedforward"], after["effects"] = self.feedforward(x, context.fold(2), state.feedforward)
            return dropout(y, self.dropout, context.fold(3).key)

        y = self.arrange(x, attention, feedforward)
        return y, LayerState(after["attention"], after["feedforward"]), after["effects"]


class PreNormConfig(BlockConfig):
    """h = x + attention(norm(x)); y = h + feedforward(norm(h)) (Radford et al. 2019)."""

    kind: Literal["pre_norm"] = "pre_norm"

    def build(self, layer: LayerConfig, model: ModelConfig, init: Initializer) -> PreNorm:
        return PreNorm(layer, model, init)


class PreNorm(Block):
    def __init__(self, layer: LayerConfig, model: ModelConfig, init: Initializer):
        super().__init__(layer, model, init)
        self.attention_norm = layer.norm.build(model, init)
        self.feedforward_norm = layer.norm.build(model, init)

    def arrange(self, x: Hidden, attention: Sublayer, feedforward: Sublayer) -> Hidden:
        h = x + attention(self.attention_norm(x))
        return h + feedforward(self.feedforward_norm(h))


class PostNormConfig(BlockConfig):
    """h = norm(x + attention(x)); y = norm(h + feedforward(h)) (Vaswani et al. 2017; GPT-1)."""

    kind: Literal["post_norm"] = "post_norm"

    def build(self, layer: LayerConfig, model: ModelConfig, init: Initializer) -> PostNorm:
        return PostNorm(layer, model, init)


class PostNorm(PreNorm):
    def arrange(self, x: Hidden, attention: Sublayer, feedforward: Sublayer) -> Hidden:
        h = self.attention_norm(x + attention(x))
        return self.feedforward_norm(h + feedforward(h))


class SandwichConfig(BlockConfig):
    """h = x + norm(attention(norm(x))); y = h + norm(feedforward(norm(h))) (Ding et al. 2021; Gemma 2)."""

    kind: Literal["sandwich"] = "sandwich"

    def build(self, layer: LayerConfig, model: ModelConfig, init: Initializer) -> Sandwich:
        return Sandwich(layer, model, init)


class Sandwich(PreNorm):
    def __init__(self, layer: LayerConfig, model: ModelConfig, init: Initializer):
        super().__init__(layer, model, init)
        self.attention_out_norm = layer.norm.build(model, init)
        self.feedforward_out_norm = layer.norm.build(model, init)

    def arrange(self, x: Hidden, attention: Sublayer, feedforward: Sublayer) -> Hidden:
        h = x + self.attention_out_norm(attention(self.attention_norm(x)))
        return h + self.feedforward_out_norm(feedforward(self.feedforward_norm(h)))


class ParallelConfig(BlockConfig):
    """y = x + attention(norm(x)) + feedforward(norm(x)), one norm for both (Wang & Komatsuzaki 2021, GPT-J)."""

    kind: Literal["parallel"] = "parallel"

    def build(self, layer: LayerConfig, model: ModelConfig, init: Initializer) -> Parallel:
        return Parallel(layer, model, init)


class Parallel(Block):
    def __init__(self, layer: LayerConfig, model: ModelConfig, init: Initializer):
        super().__init__(layer, model, init)
        self.norm = layer.norm.build(model, init)

    def arrange(self, x: Hidden, attention: Sublayer, feedforward: Sublayer) -> Hidden:
        normed = self.norm(x)
        return x + attention(normed) + feedforward(normed)


REGISTRY: dict[str, type[BlockConfig]] = {
    "pre_norm": PreNormConfig,
    "post_norm": PostNormConfig,
    "sandwich": SandwichConfig,
    "parallel": ParallelConfig,
}
