"""One layer: attention and a feed-forward around the residual stream; this is the menu of ways to arrange them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from flax import nnx
from jaxtyping import Array, Float, PyTree

from polygpt.model.parts import Context, Effects, Initializer, ModelPart, dropout

if TYPE_CHECKING:
    from polygpt.model.config import LayerConfig, ModelConfig

Hidden = Float[Array, "B T D"]


class LayerState(NamedTuple):
    """The decoding state of one layer: what its attention and its feed-forward keep."""

    attention: PyTree
    feedforward: PyTree


class BlockConfig(ModelPart):
    """The slot `block`: builds a module that maps x [B, T, D] to [B, T, D], the next state, and effects."""

    def build(self, layer: LayerConfig, model: ModelConfig, init: Initializer) -> Any:
        """The NNX module of one layer, with its parameters drawn from `init`."""
        raise NotImplementedError


class PreNormConfig(BlockConfig):
    """h = x + attention(norm(x)); y = h + feedforward(norm(h)) (Radford et al. 2019)."""

    kind: Literal["pre_norm"] = "pre_norm"

    def build(self, layer: LayerConfig, model: ModelConfig, init: Initializer) -> PreNorm:
        return PreNorm(layer, model, init)


class PreNorm(nnx.Module):
    def __init__(self, layer: LayerConfig, model: ModelConfig, init: Initializer):
        self.dropout = model.dropout
        self.attention_norm = layer.norm.build(model, init)
        self.attention = layer.attention.build(model, init)
        self.feedforward_norm = layer.norm.build(model, init)
        self.feedforward = layer.feedforward.build(model, init)

    def attend(self, x: Hidden, context: Context, state: LayerState) -> tuple[Hidden, PyTree]:
        """Attention's output after dropout, and its next state."""
        mixed, after = self.attention(x, context.fold(0), state.attention)
        return dropout(mixed, self.dropout, context.fold(1).key), after

    def feed(self, x: Hidden, context: Context, state: LayerState) -> tuple[Hidden, PyTree, Effects]:
        """The feed-forward's output after dropout, its next state and its effects."""
        fed, after, effects = self.feedforward(x, context.fold(2), state.feedforward)
        return dropout(fed, self.dropout, context.fold(3).key), after, effects

    def __call__(self, x: Hidden, context: Context, state: LayerState) -> tuple[Hidden, LayerState, Effects]:
        mixed, attention_state = self.attend(self.attention_norm(x), context, state)
        h = x + mixed
        fed, feedforward_state, effects = self.feed(self.feedforward_norm(h), context, state)
        return h + fed, LayerState(attention_state, feedforward_state), effects


class PostNormConfig(BlockConfig):
    """h = norm(x + attention(x)); y = norm(h + feedforward(h)) (Vaswani et al. 2017; GPT-1)."""

    kind: Literal["post_norm"] = "post_norm"

    def build(self, layer: LayerConfig, model: ModelConfig, init: Initializer) -> PostNorm:
        return PostNorm(layer, model, init)


class PostNorm(PreNorm):
    def __call__(self, x: Hidden, context: Context, state: LayerState) -> tuple[Hidden, LayerState, Effects]:
        mixed, attention_state = self.attend(x, context, state)
        h = self.attention_norm(x + mixed)
        fed, feedforward_state, effects = self.feed(h, context, state)
        return self.feedforward_norm(h + fed), LayerState(attention_state, feedforward_state), effects


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

    def __call__(self, x: Hidden, context: Context, state: LayerState) -> tuple[Hidden, LayerState, Effects]:
        mixed, attention_state = self.attend(self.attention_norm(x), context, state)
        h = x + self.attention_out_norm(mixed)
        fed, feedforward_state, effects = self.feed(self.feedforward_norm(h), context, state)
        return h + self.feedforward_out_norm(fed), LayerState(attention_state, feedforward_state), effects


class ParallelConfig(BlockConfig):
    """y = x + attention(norm(x)) + feedforward(norm(x)), one norm for both (Wang & Komatsuzaki 2021, GPT-J)."""

    kind: Literal["parallel"] = "parallel"

    def build(self, layer: LayerConfig, model: ModelConfig, init: Initializer) -> Parallel:
        return Parallel(layer, model, init)


class Parallel(PreNorm):
    def __init__(self, layer: LayerConfig, model: ModelConfig, init: Initializer):
        self.dropout = model.dropout
        self.norm = layer.norm.build(model, init)
        self.attention = layer.attention.build(model, init)
        self.feedforward = layer.feedforward.build(model, init)

    def __call__(self, x: Hidden, context: Context, state: LayerState) -> tuple[Hidden, LayerState, Effects]:
        normed = self.norm(x)
        mixed, attention_state = self.attend(normed, context, state)
        fed, feedforward_state, effects = self.feed(normed, context, state)
        return x + mixed + fed, LayerState(attention_state, feedforward_state), effects


MENU: dict[str, type[BlockConfig]] = {
    "pre_norm": PreNormConfig,
    "post_norm": PostNormConfig,
    "sandwich": SandwichConfig,
    "parallel": ParallelConfig,
}
