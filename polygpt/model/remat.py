"""Rematerialization: what the gradient computes again rather than keep in memory (Chen et al. 2016).

Policies, for L layers:

- `none`: whatever the gradient needs is kept (but for weights that a mesh splits: they are gathered again).
- `dots`: of each block, its input and the products with weights; norms, activations and attention scores are computed
  again, which costs little.
- `block`: of each block, its input. Every block is computed twice.
- `full`: the inputs of about sqrt(L) blocks. Every block is computed three times, all but one in sqrt(L) of them only
  when the gradient comes to its segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax import lax
from jaxtyping import PyTree

from polygpt.sharding import current_mesh, keeps_gathered

Remat = Literal["none", "block", "dots", "full"]


def rematerialized(block: Callable, remat: Remat) -> Callable:
    """`block`, whose first argument is static, under a policy."""
    scope = current_mesh()
    if remat == "none" and (scope is None or not scope.gathers):
        return block
    policy = {"none": keeps_gathered, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}.get(remat)
    return jax.checkpoint(block, policy=policy, static_argnums=0)


def scan_in_segments(body: Callable, carry: PyTree, inputs: PyTree, unroll: int = 1) -> tuple[PyTree, PyTree]:
    """`lax.scan` that keeps, for the gradient, the carry at the start of about sqrt(length) segments."""
    length = jax.tree.leaves(inputs)[0].shape[0]
    size = max(math.isqrt(length), 1)
    count = length // size

    @jax.checkpoint
    def segment(carry: PyTree, part: PyTree) -> tuple[PyTree, PyTree]:
        return lax.scan(body, carry, part, unroll=min(unroll, size))

    def cut(leaf: Any) -> Any:
        return leaf[: count * size].reshape(count, size, *leaf.shape[1:])

    carry, outputs = lax.scan(segment, carry, jax.tree.map(cut, inputs), unroll=min(unroll, count))
    outputs = jax.tree.map(lambda leaf: leaf.reshape(count * size, *leaf.shape[2:]), outputs)
    if count * size == length:
        return carry, outputs
    carry, last = segment(carry, jax.tree.map(lambda leaf: leaf[count * size :], inputs))
    return carry, jax.tree.map(lambda a, b: jax.numpy.concatenate([a, b]), outputs, last)
