"""What shapes a score beside q·k (scale, cap, distance, window, segments, sinks), for every attention kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


@dataclass(frozen=True)
class ScoreRule:
    """How scores become probabilities: the settings, known before there are arrays.

    Attributes:
        scale: of q·k.
        window: each query sees this many keys, the last of them at its own position; None sees all.
        softcap: scores become softcap · tanh(scores / softcap) (Gemma Team 2024, section 2).
        dropout: share of probabilities dropped if a key is given.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0

    def scaled(self, q: Float[Array, "..."]) -> Float[Array, "..."]:
        """Queries times the scale; the scale itself is not rounded to 16 bits."""
        return (q.astype(jnp.float32) * self.scale).astype(q.dtype)

    def cap(self, scores: Float[Array, "..."]) -> Float[Array, "..."]:
        """Scaled scores after the soft cap."""
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)


class ScoreInputs(NamedTuple):
    """Arrays that take part in scores; each may be absent.

    Attributes:
        sinks: a learned logit for each head that joins the softmax and carries no value, [N] (OpenAI 2025, gpt-oss).
        slopes: subtracted per position of distance, for each head, float32 [N] (ALiBi).
        segment_ids: int32 [B, T].
        key: for dropout.
    """

    sinks: Float[Array, " N"] | None = None
    slopes: Float[Array, " N"] | None = None
    segment_ids: Int[Array, "B T"] | None = None
    key: PRNGKeyArray | None = None


def visible(queries: Int[Array, "*B T"], keys: Int[Array, "*B S"], window: int | None) -> Bool[Array, "*B T S"]:
    """Which keys each query sees, by their positions; a negative position means that there is no key."""
    distance = queries[..., :, None] - keys[..., None, :]
    seen = (distance >= 0) & (keys >= 0)[..., None, :]
    return seen if window is None else seen & (distance < window)


def masked_scores(
    products: Float[Array, "B K G T S"],
    rule: ScoreRule,
    inputs: ScoreInputs,
    queries: Int[Array, "#B T"],
    keys: Int[Array, "#B S"],
    seen: Bool[Array, "#B T S"],
) -> Float[Array, "B K G T S"]:
    """Scores from q·k, before the softmax: scaled, capped, less ALiBi's penalty, and -inf where nothing is `seen`.

    Args:
        queries, keys: their positions.
    """
    scores = rule.cap(products * rule.scale)
    if inputs.slopes is not None:
        slopes = inputs.slopes.reshape(products.shape[1:3])[None, :, :, None, None]
        scores = scores - slopes * (queries[:, :, None] - keys[:, None, :])[:, None, None]
    return jnp.where(seen[:, None, None], scores, -jnp.inf)
