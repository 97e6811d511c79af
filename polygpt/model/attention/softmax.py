"""`softmax`: multi-head, grouped-query or multi-query attention (Vaswani et al. 2017; Ainslie et al. 2023)."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field, PositiveInt

from polygpt.model.attention.core import Implementation, attend, attend_cache, choose
from polygpt.model.parts import AttentionConfig, Context, Initializer, dense
from polygpt.model.positions import rotate


class KVCache(NamedTuple):
    """Keys (already rotated) and values; slot s holds position s."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]


class SoftmaxAttentionConfig(AttentionConfig):
    """softmax(q·kᵀ/sqrt(H))·v over earlier positions; `num_kv_heads` keys and values serve `num_heads` queries.

    `num_kv_heads` None means `num_heads` (multi-head), 1 is multi-query. `head_dim` None means D/N. `dropout`
    drops attention probabilities in training.
    """

    kind: Literal["softmax"] = "softmax"
    num_heads: PositiveInt
    num_kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    bias: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    implementation: Implementation = "auto"

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def size(self, model) -> int:
        """The head size H."""
        return self.head_dim or model.width // self.num_heads

    def rotation_size(self, model) -> int:
        return self.size(model)

    def check(self, model) -> None:
        if self.head_dim is None and model.width % self.num_heads:
            raise ValueError(
                f"embed_dim={model.width} is not divisible by num_heads={self.num_heads}; "
                "change one of them or set attention.head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.kv_heads}: "
                "every key head serves the same number of query heads"
            )
        if self.implementation == "cudnn" and model.compute_dtype == "float32":
            raise ValueError("implementation=cudnn needs compute_dtype bfloat16 or float16, not float32")

    def implementation_name(self, model) -> str:
        dtype = jnp.dtype(model.compute_dtype)
        return choose(self.implementation, dtype, model.context_length, simple=self.dropout == 0)

    def state_bytes_per_token(self, model) -> int:
        return 2 * self.kv_heads * self.size(model) * jnp.dtype(model.compute_dtype).itemsize

    def flops_per_token(self, model) -> int:
        # q·kᵀ and p·v, 2 FLOPs a product, over the whole context as is the custom (PaLM, appendix B).
        return 4 * self.num_heads * self.size(model) * model.context_length

    def build(self, model, init: Initializer) -> SoftmaxAttention:
        return SoftmaxAttention(self, model, init)

    def init_state(self, model, batch: int, length: int) -> KVCache:
        empty = jnp.zeros((batch, length, self.kv_heads, self.size(model)), model.compute_dtype)
        return KVCache(empty, empty)


class SoftmaxAttention(nnx.Module):
    def __init__(self, config: SoftmaxAttentionConfig, model, init: Initializer):
        width, size = model.width, config.size(model)
        heads, kv_heads = config.num_heads, config.kv_heads
        self.config = config
        self.query = init.weight((width, heads, size), ("embed", "heads", "head_dim"))
        self.key = init.weight((width, kv_heads, size), ("embed", "kv_heads", "head_dim"))
        self.value = init.weight((width, kv_heads, size), ("embed", "kv_heads", "head_dim"))
        self.out = init.weight((heads, size, width), ("heads", "head_dim", "embed"), inputs=2, residual=True)
        bias = config.bias
        self.query_bias = init.constant(0.0, (heads, size), ("heads", "head_dim")) if bias else None
        self.key_bias = init.constant(0.0, (kv_heads, size), ("kv_heads", "head_dim")) if bias else None
        self.value_bias = init.constant(0.0, (kv_heads, size), ("kv_heads", "head_dim")) if bias else None
        self.out_bias = init.constant(0.0, (width,), ("embed",)) if bias else None

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, state: KVCache | None = None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        q = dense(x, self.query, self.query_bias)  # [B, T, N, H]
        k = dense(x, self.key, self.key_bias)  # [B, T, K, H]
        v = dense(x, self.value, self.value_bias)  # [B, T, K, H]
        rotation = context.rotations.get(q.shape[-1])
        q, k = rotate(q, rotation), rotate(k, rotation)
        if state is None:
            mixed = attend(
                q,
                k,
                v,
                segment_ids=context.segment_ids,
                dropout_rate=self.config.dropout,
                key=context.key,
                implementation=self.config.implementation,
            )
        else:
            rows = jnp.arange(x.shape[0])[:, None]
            # A position past the cache (padding of a short prompt) is dropped, not clamped onto the last slot.
            state = KVCache(
                state.k.at[rows, context.positions].set(k.astype(state.k.dtype), mode="drop"),
                state.v.at[rows, context.positions].set(v.astype(state.v.dtype), mode="drop"),
            )
            mixed = attend_cache(q, state.k, state.v, context.positions)
        return dense(mixed, self.out, self.out_bias), state
