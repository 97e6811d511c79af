"""Arrays of all layers in one, and the single layer that is at work on its own part of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, UInt16


@dataclass(frozen=True)
class InStack:
    """What a layer reads (and writes) where it lies, in the stack of all layers.

    Everything else is taken out of its stack for each layer, and a state is put back, too: a token of 8 rows with 160
    slots, 30 layers and 3 key heads of 64 took 25 ms for its caches so, and 7.5 ms where they lie (two cores).

    Attributes:
        layer: within a layer, its index in the stack, int32; None outside, and where there is no stack.
    """

    layer: Any = field(default=None, kw_only=True)  # JAX puts other things than arrays into a tree, too


def in_stack(leaf: Any) -> bool:
    return isinstance(leaf, InStack)


def of_layer(stacks: PyTree, index: Int[Array, ""] | int) -> PyTree:
    """One layer's part of the stacks."""

    def one(leaf: Any) -> Any:
        return replace(leaf, layer=index) if in_stack(leaf) else lax.dynamic_index_in_dim(leaf, index, keepdims=False)

    return jax.tree.map(one, stacks, is_leaf=in_stack)


def put_back(stacks: PyTree, after: PyTree, index: Int[Array, ""] | int) -> PyTree:
    """The stacks with one layer's part replaced."""

    def one(leaf: Any, new: Any) -> Any:
        return replace(new, layer=None) if in_stack(new) else lax.dynamic_update_index_in_dim(leaf, new, index, 0)

    return jax.tree.map(one, stacks, after, is_leaf=in_stack)


def kept_type(dtype: str | jnp.dtype) -> jnp.dtype:
    """The type in which a stack keeps numbers of `dtype` on this machine: 16-bit floats on a CPU as their bits.

    XLA slices no 16-bit floats there: it converts the whole stack to 32 bits and back for one layer of it.
    """
    dtype = jnp.dtype(dtype)
    return jnp.dtype(jnp.uint16) if dtype.itemsize == 2 and jax.default_backend() == "cpu" else dtype


def as_kept(numbers: Float[Array, "*shape"], kept: jnp.dtype) -> Float[Array, "*shape"] | UInt16[Array, "*shape"]:
    """`numbers` in the type `kept`: the bits of 16-bit floats, or converted."""
    return lax.bitcast_convert_type(numbers, kept) if kept == jnp.uint16 else numbers.astype(kept)


def as_numbers(values: Array, dtype: str | jnp.dtype) -> Array:
    """What `values` stand for: of bits the numbers of `dtype`, anything else itself."""
    return lax.bitcast_convert_type(values, jnp.dtype(dtype)) if values.dtype == jnp.uint16 else values
