"""Functions of 16-bit numbers that are computed in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def in_float32(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function` of arrays, computed in float32 at least and rounded once, to the dtype of the first.

    Rounding each operation is slower: a silu and a product of 512 x 1536 16-bit numbers took 1.18 ms on two cores, and
    0.73 rounded once. For 16-bit numbers the gradient recomputes the function from its arguments, because float32
    intermediates would take twice the memory (in a scan over layers; elsewhere XLA may keep them). Keyword arguments
    are constants.
    """

    @wraps(function)
    def rounded(x: Array, *others: Array | None, **constants: Any) -> Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)

        def inside(*arrays: Array | None) -> Array:
            widened = (None if array is None else array.astype(wide) for array in arrays)
            return function(*widened, **constants).astype(x.dtype)

        if x.dtype.itemsize == 2:
            # A scan's two loops are never merged, and the barrier would keep XLA from fusing this with its neighbours.
            inside = jax.checkpoint(inside, prevent_cse=False)
        return inside(x, *others)

    return rounded
