"""Stacks of all layers' arrays, and the view that a single layer has of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, UInt16

from polygpt.sharding import current_mesh


@dataclass(frozen=True)
class InStack:
    """Something that a layer reads and writes in place, in the stack of all layers.

    Everything else is sliced out of its stack for each layer, and states are written back. For the caches that took
    25 ms a token of 8 rows, with 160 slots, 30 layers and 3 key heads of 64 on two cores; in place it takes 7.5 ms.

    Attributes:
        layer: within a layer, its index in the stack, int32; None outside, or if there is no stack.
    """

    layer: Any = field(default=None, kw_only=True)  # not always an array: JAX also puts other things into trees


def in_stack(leaf: Any) -> bool:
    """Whether a leaf is read in place."""
    return isinstance(leaf, InStack)


def layer_view(stacks: PyTree, index: Int[Array, ""] | int) -> PyTree:
    """One layer's view of the stacks."""

    def one(leaf: Any) -> Any:
        return replace(leaf, layer=index) if in_stack(leaf) else lax.dynamic_index_in_dim(leaf, index, keepdims=False)

    return jax.tree.map(one, stacks, is_leaf=in_stack)


def write_back(stacks: PyTree, after: PyTree, index: Int[Array, ""] | int) -> PyTree:
    """The stacks after one layer has changed its view of them to `after`."""

    def one(leaf: Any, new: Any) -> Any:
        return replace(new, layer=None) if in_stack(new) else lax.dynamic_update_index_in_dim(leaf, new, index, 0)

    return jax.tree.map(one, stacks, after, is_leaf=in_stack)


def max_unrolled_layers(training: bool, backend: str | None = None) -> int:
    """The largest number of layers to unroll by default, on JAX's backend or the one named; more are scanned over.

    On an H200 a training step of GPT-2 (12 layers) took 44 ms scanned, 8 of them for filling, writing and copying the
    stacked residuals, and 36 ms unrolled; the first step came after 64 and 76 s. Decoding and evaluation scan earlier,
    since they compile a program for each shape.
    """
    alone_on_gpu = (backend or jax.default_backend()) == "gpu" and current_mesh() is None
    return 24 if alone_on_gpu and training else 8


def stored_dtype(dtype: str | jnp.dtype) -> jnp.dtype:
    """The dtype in which a stack stores numbers of `dtype` on this machine: 16-bit floats on a CPU as their bits.

    XLA cannot slice 16-bit floats there: it converts the whole stack to 32 bits and back for one layer of it.
    """
    dtype = jnp.dtype(dtype)
    return jnp.dtype(jnp.uint16) if dtype.itemsize == 2 and jax.default_backend() == "cpu" else dtype


def to_stored(numbers: Float[Array, "*shape"], stored: jnp.dtype) -> Float[Array, "*shape"] | UInt16[Array, "*shape"]:
    """`numbers` in the dtype `stored`: the bits of 16-bit floats, or converted."""
    return lax.bitcast_convert_type(numbers, stored) if stored == jnp.uint16 else numbers.astype(stored)


def from_stored(values: Array, dtype: str | jnp.dtype) -> Array:
    """The numbers of `dtype` that stored `values` stand for; what is not stored as bits is returned as it is."""
    return lax.bitcast_convert_type(values, jnp.dtype(dtype)) if values.dtype == jnp.uint16 else values
