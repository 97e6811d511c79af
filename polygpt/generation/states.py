"""Rows of decoding states: how one is put into a slot, cut into blocks of positions, and put together again.

Leaves are [layers, B, ...]. A key-value cache that holds all positions can be cut by position; everything else (a ring,
a recurrence, a pool) is kept whole, as a snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PyTree

from polygpt.kernels import KVCache


def placed(state: PyTree, params: PyTree) -> PyTree:
    """A new state on the device that holds the weights, as the states that programs return are.

    Otherwise every program would be compiled twice: for a state that may be moved, and for one that may not.
    """
    first = jax.tree.leaves(params)[0]
    fixed = isinstance(first, jax.Array) and first.committed and len(first.devices()) == 1
    return jax.device_put(state, *first.devices()) if fixed else state


def cuttable(state: PyTree, length: int) -> list[bool]:
    """For each leaf, whether its second axis from the end counts positions 0 to `length`."""

    def of(node: PyTree) -> PyTree:
        cut = isinstance(node, KVCache) and node.slots == length
        return jax.tree.map(lambda _: cut, node)

    return jax.tree.leaves(jax.tree.map(of, state, is_leaf=lambda node: isinstance(node, KVCache)))


def take_block(row: PyTree, start: Int[Array, ""], size: int, length: int) -> list[Array]:
    """`size` positions from `start` on of what can be cut, and all of what cannot, as new arrays."""
    leaves = zip(jax.tree.leaves(row), cuttable(row, length), strict=True)
    return [lax.dynamic_slice_in_dim(leaf, start, size, -2) if cut else jnp.copy(leaf) for leaf, cut in leaves]


def put_block(row: PyTree, block: Sequence[Array], start: Int[Array, ""], length: int) -> PyTree:
    """The row with what `take_block` took."""
    leaves, structure = jax.tree.flatten(row)
    put = [
        lax.dynamic_update_slice_in_dim(leaf, new, start, -2) if cut else new
        for leaf, new, cut in zip(leaves, block, cuttable(row, length), strict=True)
    ]
    return jax.tree.unflatten(structure, put)


def restart(row: PyTree, empty: PyTree, length: int) -> PyTree:
    """The row as for a new sequence. Of a cache nothing beyond the last position is read, so it stays as it is."""
    leaves, structure = jax.tree.flatten(row)
    fresh = zip(leaves, jax.tree.leaves(empty), cuttable(row, length), strict=True)
    return jax.tree.unflatten(structure, [leaf if cut else jnp.copy(new) for leaf, new, cut in fresh])


def row_of(state: PyTree, slot: Int[Array, ""]) -> PyTree:
    """A copy of one slot's row."""
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, slot, 1, 1), state)


def with_row(state: PyTree, row: PyTree, slot: Int[Array, ""]) -> PyTree:
    """The state with a slot's row replaced."""
    return jax.tree.map(lambda leaf, own: lax.dynamic_update_slice_in_dim(leaf, own, slot, 1), state, row)


def insert(state: PyTree, row: PyTree, slot: Int[Array, ""], used: Int[Array, ""], block: int, length: int) -> PyTree:
    """`state` with the first `used` positions of `row` in a slot, in whole blocks."""
    leaves, structure = jax.tree.flatten(state)
    new, cuts = jax.tree.leaves(row), cuttable(row, length)
    leaves = [
        leaf if cut else lax.dynamic_update_slice_in_dim(leaf, own, slot, 1)
        for leaf, own, cut in zip(leaves, new, cuts, strict=True)
    ]
    places = [place for place, cut in enumerate(cuts) if cut]

    def copy(index: Array, caches: list[Array]) -> list[Array]:
        start = index * block
        copied = []
        for cache, place in zip(caches, places, strict=True):
            piece = lax.dynamic_slice_in_dim(new[place], start, block, -2)
            begin = [0, slot, *[0] * (cache.ndim - 4), start, 0]
            copied.append(lax.dynamic_update_slice(cache, piece, begin))
        return copied

    caches = lax.fori_loop(0, -(-used // block), copy, [leaves[place] for place in places])
    for place, cache in zip(places, caches, strict=True):
        leaves[place] = cache
    return jax.tree.unflatten(structure, leaves)
