"""What guards a run against steps that would spoil it: updates that are not finite, and spikes of the loss.

A loss is a spike if it exceeds the mean of those before it by more than `training.spike_threshold` deviations. Mean
and variance are exponentially weighted, with a horizon of 50 steps; the deviation is at least 1 % of the mean, so that
a loss that has stopped moving does not make every rise a spike. The first 20 losses are never spikes. A spike enters
the statistics as the largest loss that would not have been one, so that a loss that stays high is the mean before long.
Skipped steps do not enter them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

WARM_UP, HORIZON, LEAST_DEVIATION = 20, 50, 0.01


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

    def limit(self, threshold: float | None) -> Float[Array, ""]:
        """The loss above which the next one is a spike; infinite during the warm-up and without a threshold."""
        if threshold is None:
            return jnp.float32(jnp.inf)
        deviation = jnp.maximum(jnp.sqrt(self.variance), LEAST_DEVIATION * jnp.abs(self.mean))
        return jnp.where(self.losses < WARM_UP, jnp.inf, self.mean + threshold * deviation)

    def after_step(self, loss: Float[Array, ""], limit: Float[Array, ""]) -> Guard:
        """After a step that updated the parameters."""
        # The plain mean of the first losses, weighted exponentially from there on.
        losses = jnp.minimum(self.losses + 1, HORIZON)
        change = jnp.minimum(loss, limit) - self.mean
        mean = self.mean + change / losses
        variance = (1 - 1 / losses) * (self.variance + jnp.square(change) / losses)
        return self._replace(in_a_row=jnp.zeros_like(self.in_a_row), losses=losses, mean=mean, variance=variance)

    def after_skipping(self) -> Guard:
        """After a step that was skipped."""
        return self._replace(skipped=self.skipped + 1, in_a_row=self.in_a_row + 1)


def choose(condition: Bool[Array, ""], yes: PyTree, no: PyTree) -> PyTree:
    """One of two trees of arrays."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
