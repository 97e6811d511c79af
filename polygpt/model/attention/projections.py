"""Queries, keys and values from hidden states, and back: what every kind of attention shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from flax import nnx
from jaxtyping import Array, Float
from pydantic import PositiveInt

from polygpt.model.parts import AttentionConfig, Initializer, dense, dense_each

if TYPE_CHECKING:
    from polygpt.model.config import ModelConfig


class HeadsConfig(AttentionConfig):
    """Attention in heads.

    Attributes:
        num_heads: N.
        num_kv_heads: K; None means `num_heads` (multi-head), 1 is multi-query.
        head_dim: H; None means D/N.
        bias: of the four projections, or (`qkv`) of the three that the heads read (Qwen 2).
    """

    num_heads: PositiveInt
    num_kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    bias: bool | Literal["qkv"] = False

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def head_size(self, model: ModelConfig) -> int:
        """The head size H."""
        return self.head_dim or model.width // self.num_heads

    def rotation_size(self, model: ModelConfig) -> int:
        return self.head_size(model)

    def check(self, model: ModelConfig) -> None:
        if self.head_dim is None and model.width % self.num_heads:
            raise ValueError(
                f"embed_dim={model.width} is not divisible by num_heads={self.num_heads}; "
                "change one of them or set attention.head_dim"
            )
        if self.num_heads % self.kv_heads:
            *few, last = [str(count) for count in range(1, self.num_heads + 1) if self.num_heads % count == 0]
            choices = f"{', '.join(few)} or {last}" if few else last
            raise ValueError(
                f"num_kv_heads must be {choices}, not {self.kv_heads}: each serves the same number of the "
                f"num_heads={self.num_heads} query heads"
            )


class Projections(nnx.Module):
    """The four projections; a kind of attention derives from it and says what happens between them."""

    def __init__(self, config: HeadsConfig, model: ModelConfig, init: Initializer):
        width, size = model.width, config.head_size(model)
        heads, kv_heads = config.num_heads, config.kv_heads
        self.query = init.weight((width, heads, size), ("embed", "heads", "head_dim"))
        self.key = init.weight((width, kv_heads, size), ("embed", "kv_heads", "head_dim"))
        self.value = init.weight((width, kv_heads, size), ("embed", "kv_heads", "head_dim"))
        self.out = init.weight((heads, size, width), ("heads", "head_dim", "embed"), inputs=2, residual=True)
        bias = config.bias
        self.query_bias = init.constant(0.0, (heads, size), ("heads", "head_dim")) if bias else None
        self.key_bias = init.constant(0.0, (kv_heads, size), ("kv_heads", "head_dim")) if bias else None
        self.value_bias = init.constant(0.0, (kv_heads, size), ("kv_heads", "head_dim")) if bias else None
        self.out_bias = init.constant(0.0, (width,), ("embed",)) if bias is True else None

    def project(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries, keys and values."""
        pairs = (self.query, self.query_bias), (self.key, self.key_bias), (self.value, self.value_bias)
        return tuple(dense_each(x, *pairs))

    def merge(self, mixed: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """All heads' outputs back to the residual stream."""
        return dense(mixed, self.out, self.out_bias)
