"""Initial values: standard normal numbers by name, so that one part's do not depend on which others there are."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PRNGKeyArray

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
