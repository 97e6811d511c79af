"""The exponential moving average of the weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from polygpt.model import Params


def start_average(params: Params) -> Params:
    """A float32 copy of the parameters."""
    return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)


def update_average(average: Params, params: Params, decay: float, updates: Int[Array, ""]) -> Params:
    """The average after `updates` updates, the newest of which made `params`.

    The decay warms up as min(decay, (1 + updates) / (10 + updates)), so that the first weights are soon forgotten.
    """
    count = updates.astype(jnp.float32)
    share = 1 - jnp.minimum(decay, (1 + count) / (10 + count))
    return jax.tree.map(lambda a, p: a + share * (p.astype(jnp.float32) - a), average, params)
