"""Initial values: standard normal numbers by name, so that one part's do not depend on which others there are."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

# Numbers drawn from one key. One size for all: a generator compiled for every shape took 4.5 s of the demo's start on
# two cores.
BLOCK = 4096


def draw_parameters(key: PRNGKeyArray, infos: dict[str, Any], truncated: bool) -> dict[str, Any]:
    """Values for each parameter of the tree `infos`; `truncated` at two deviations.

    Block b of the parameter at a path is drawn from fold_in(fold_in(key, hash of the path), b).
    """
    flat = flatten_dict(infos)
    drawn = {path: -(-info.size // BLOCK) for path, info in flat.items() if info.deviation}
    blocks = {}
    if drawn:
        counts = list(drawn.values())
        hashes = jnp.asarray(np.repeat([_hash(path) for path in drawn], counts), jnp.uint32)
        index = jnp.asarray(np.concatenate([np.arange(count) for count in counts]), jnp.uint32)
        numbers = _draw_blocks(key, hashes, index, truncated)
        starts = np.cumsum([0, *counts])
        blocks = {path: numbers[starts[i] : starts[i + 1]] for i, path in enumerate(drawn)}
    values = {}
    for path, info in flat.items():
        if path not in blocks:
            values[path] = jnp.full(info.shape, info.mean, info.dtype)
            continue
        numbers = blocks[path].reshape(-1)[: math.prod(info.shape)].reshape(info.shape)
        values[path] = (info.deviation * numbers).astype(info.dtype)
    return unflatten_dict(values)


def _draw_blocks(key: PRNGKeyArray, hashes: jax.Array, index: jax.Array, truncated: bool) -> jax.Array:
    """float32 [len(index), BLOCK]."""

    def one(path_hash: jax.Array, block: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, path_hash), block)
        return jax.random.truncated_normal(own, -2, 2, BLOCK) if truncated else jax.random.normal(own, BLOCK)

    return jax.vmap(one)(hashes, index)


def _hash(path: tuple) -> int:
    """32 bits of a path, the same in every process."""
    return int.from_bytes(hashlib.sha256(".".join(map(str, path)).encode()).digest()[:4], "big")


# --- On a mesh: every device draws the numbers that it holds, and no other -----------------------------------


def draw_on_mesh(
    key: PRNGKeyArray, infos: dict[str, Any], shardings: dict[str, Any], truncated: bool
) -> dict[str, Any]:
    """The values of `draw_parameters`, each device's part computed there."""
    flat, placed = flatten_dict(infos), flatten_dict(shardings)
    mesh = next(iter(placed.values())).mesh
    drawn = [path for path, info in flat.items() if info.deviation]

    def own(key: PRNGKeyArray) -> dict[tuple, Array]:
        sizes = [placed[path].shard_shape(flat[path].shape) for path in drawn]
        places = [_places(flat[path].shape, placed[path]) for path in drawn]
        hashes = [np.full(math.prod(size), _hash(path), np.uint32) for path, size in zip(drawn, sizes, strict=True)]
        # One generator for all parameters, as above.
        joined = (jnp.concatenate([x.reshape(-1) for x in parts]) for parts in zip(*places, strict=True))
        numbers = _draw_each(key, jnp.concatenate([*map(jnp.asarray, hashes)]), *joined, truncated)
        cuts = np.cumsum([math.prod(size) for size in sizes])[:-1]
        pieces = dict(zip(drawn, jnp.split(numbers, cuts), strict=True))
        values = {}
        for path, info in flat.items():
            size = placed[path].shard_shape(info.shape)
            if path in pieces:
                values[path] = (info.deviation * pieces[path].reshape(size)).astype(info.dtype)
            else:
                values[path] = jnp.full(size, info.mean, info.dtype)
        return values

    specs = {path: sharding.spec for path, sharding in placed.items()}
    drawing = jax.shard_map(own, mesh=mesh, in_specs=PartitionSpec(), out_specs=specs, check_vma=False)
    return unflatten_dict(jax.jit(drawing)(key))


def _places(shape: tuple[int, ...], sharding: NamedSharding) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """Of each number that this device holds: its block, and its place in the block."""
    own = sharding.shard_shape(shape)
    block, place = jnp.zeros(own, jnp.uint32), jnp.zeros(own, jnp.uint32)
    for axis, names in enumerate(sharding.spec):
        first = 0 if names is None else lax.axis_index(names) * own[axis]
        index = (first + lax.broadcasted_iota(jnp.int32, own, axis)).astype(jnp.uint32)
        blocks, rest = divmod(math.prod(shape[axis + 1 :]), BLOCK)
        # The place may grow beyond the block; index · rest, of at most 2^20 rows, still fits 32 bits.
        block, place = block + index * np.uint32(blocks), place + index * np.uint32(rest)
        block, place = block + place // BLOCK, place % BLOCK
    return block, place


def _draw_each(
    key: PRNGKeyArray,
    path_hash: UInt32[Array, " M"],
    block: UInt32[Array, " M"],
    place: UInt32[Array, " M"],
    truncated: bool,
) -> Float[Array, " M"]:
    """For each number that of `_draw_blocks`, found from its place alone.

    JAX's numbers depend on their place in the array alone: the bits at place i are both halves of fold_in(key, i),
    combined (`jax_threefry_partitionable`).
    """

    def bits(path_hash: Array, block: Array, place: Array) -> Array:
        own = jax.random.fold_in(jax.random.fold_in(key, path_hash), block)
        first, second = jax.random.key_data(jax.random.fold_in(own, place))
        return first ^ second

    return _normal(jax.vmap(bits)(path_hash, block, place), truncated)


def _normal(bits: UInt32[Array, " M"], truncated: bool) -> Float[Array, " M"]:
    """Standard normal numbers from uniform bits, as `jax.random.normal` and `truncated_normal` (at 2) make them."""
    ones = lax.bitcast_convert_type((bits >> 9) | np.uint32(0x3F800000), jnp.float32) - 1
    root = np.array(np.sqrt(2), np.float32)
    if not truncated:
        low = np.nextafter(np.float32(-1), np.float32(0))
        return root * lax.erf_inv(lax.max(low, ones * (np.float32(1) - low) + low))
    low, high = (lax.erf(np.float32(bound) / root) for bound in (-2, 2))
    uniform = lax.max(low, ones * (high - low) + low)
    inside = np.nextafter(np.float32(-2), np.float32(np.inf)), np.nextafter(np.float32(2), np.float32(-np.inf))
    return lax.clamp(inside[0], root * lax.erf_inv(uniform), inside[1])
