"""What guards a run against steps that would spoil it: updates that are not finite, and spikes of the loss."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Guard(NamedTuple):
    """Counters of skipped steps, and the statistics of the loss by which a spike is recognised.

    Attributes:
        skipped: steps skipped so far because their update was not finite.
        in_a_row: how many of them are the last ones.
        losses: how many losses the statistics are of.
        mean, variance: of the loss, exponentially weighted.
    """

    skipped: Int[Array, ""]
    in_a_row: Int[Array, ""]
    losses: Int[Array, ""]
    mean: Float[Array, ""]
    variance: Float[Array, ""]

    @classmethod
    def new(cls) -> Guard:
        """Before the first step."""
        types = (jnp.int32, jnp.int32, jnp.int32, jnp.float32, jnp.float32)
        return cls(*(jnp.zeros((), dtype) for dtype in types))  # each its own buffer, as they are donated
