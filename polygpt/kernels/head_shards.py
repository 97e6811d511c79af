"""Attention on a mesh: every device mixes its own rows by its own heads, and nothing is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from polygpt.sharding import axes_of, current_mesh, device_index, sharded


def sharded_over_heads(
    function: Callable[..., Float[Array, "B T N H"]],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    rows: PyTree = None,
    heads: PyTree = None,
    kv_heads: PyTree = None,
    key: Array | None = None,
) -> Float[Array, "B T N H"]:
    """`function(q, k, v, rows, heads, kv_heads, key)`, by every device of the mesh in scope for its own part.

    Where fewer kv heads than devices are there, each device holds all of them and takes those of its query heads.

    Args:
        function: may have fewer rows and heads than the whole; its numbers must not depend on the others.
        q, k, v: queries, keys and values.
        rows: arrays whose first axis is that of the rows.
        heads, kv_heads: arrays whose first axis counts query heads, or kv heads.
        key: of dropout; every device draws its own numbers.
    """
    scope = current_mesh()
    splits = {} if scope is None else scope.splits(batch=q.shape[0], heads=q.shape[2], kv_heads=k.shape[2])
    if not any(splits.values()):
        return function(q, k, v, rows, heads, kv_heads, key)
    split_heads, group = splits["heads"], q.shape[2] // k.shape[2]
    taken = bool(split_heads) and splits["kv_heads"] != split_heads
    splits = {**splits, "kv_heads": () if taken else split_heads}
    drawn = (*splits["batch"], *split_heads)

    def own(q: Array, k: Array, v: Array, rows: PyTree, heads: PyTree, kv_heads: PyTree, key: Array | None) -> Array:
        if taken:
            first = device_index(split_heads) * q.shape[2]
            k, v = (_serving(x, first, q.shape[2], group, 2) for x in (k, v))
            kv_heads = jax.tree.map(lambda x: _serving(x, first, q.shape[2], group, 0), kv_heads)
        key = None if key is None else jax.random.fold_in(key, device_index(drawn))
        return function(q, k, v, rows, heads, kv_heads, key)

    def first(axis: str, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda _: axes_of(axis), tree)

    queries, keys = axes_of("batch", None, "heads"), axes_of("batch", None, "kv_heads")
    trees: tuple[Any, ...] = first("batch", rows), first("heads", heads), first("kv_heads", kv_heads)
    in_axes = (queries, keys, keys, *trees, None if key is None else axes_of())
    return sharded(own, splits, in_axes, queries)(q, k, v, rows, heads, kv_heads, key)


def _serving(x: Array, first: Int[Array, ""], heads: int, group: int, axis: int) -> Array:
    """Of all kv heads those that serve `heads` query heads from `first` on; `group` query heads share one."""
    if group % heads == 0 or heads % group == 0:
        return lax.dynamic_slice_in_dim(x, first // group, max(heads // group, 1), axis)
    return jnp.take(x, (first + jnp.arange(heads)) // group, axis=axis)
