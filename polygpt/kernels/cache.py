"""The cache of keys and values that attention keeps while decoding."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from polygpt.kernels.stacks import InStack, from_stored, stored_dtype, to_stored


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache(InStack):
    """Keys (already rotated) and values of the last S positions; position p is in slot p modulo S.

    Attributes:
        k, v: [B, K, S, H], of all layers [layers, B, K, S, H]; the keys of a head are contiguous. Floats, or the bits
            of 16-bit floats as unsigned integers.
        dtype: of the numbers.
    """

    k: Any
    v: Any
    dtype: str = field(metadata={"static": True})

    @classmethod
    def empty(cls, batch: int, kv_heads: int, slots: int, head_dim: int, dtype: str) -> KVCache:
        """A cache of zeros for one layer.

        On a CPU a token of 8 rows took 49 ms with 16 bits kept as bits, 51 with float32, and 100 with 16-bit floats.
        """
        zeros = jnp.zeros((batch, kv_heads, slots, head_dim), stored_dtype(dtype))
        return cls(zeros, zeros, dtype)

    @property
    def slots(self) -> int:
        return self.k.shape[-2]

    def read(self) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """The layer's keys and values."""
        own = (lax.dynamic_index_in_dim(leaf, self.layer, keepdims=False) for leaf in (self.k, self.v))
        return tuple(from_stored(leaf, self.dtype).swapaxes(1, 2) for leaf in own)

    def read_block(self, start: Int[Array, ""], size: int) -> tuple[Float[Array, "B K s H"], Float[Array, "B K s H"]]:
        """The keys and values in `size` slots from `start` on, of this layer."""
        b, heads, _, h = self.k.shape[-4:]
        where, shape = (0, 0, start, 0), (b, heads, size, h)
        if self.layer is not None:
            where, shape = (self.layer, *where), (1, *shape)
        own = (lax.dynamic_slice(leaf, where, shape).reshape(b, heads, size, h) for leaf in (self.k, self.v))
        return tuple(from_stored(leaf, self.dtype) for leaf in own)

    def write(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
        last: Int[Array, "B 1"],
    ) -> KVCache:
        """The cache with the keys and values at `positions` up to `last`; later ones are padding and left out."""
        slots = self.slots
        # Of tokens that share a slot only the last may write: the order of equal indices is undefined.
        written = (positions <= last) & (positions > last - slots)
        index = jnp.where(written, positions % slots, slots)  # beyond the last slot: dropped
        where = self.layer, jnp.arange(k.shape[0])[:, None], slice(None), index
        pairs = ((self.k, k), (self.v, v))
        k, v = (old.at[where].set(to_stored(new, old.dtype), mode="drop") for old, new in pairs)
        return replace(self, k=k, v=v)

    def positions(self, last: Int[Array, "B 1"]) -> Int[Array, "B S"]:
        """The position that each slot holds once `last` has been written; negative if none."""
        return last - (last - jnp.arange(self.slots)) % self.slots
