"""How likely each token of a text is, and what the model would have written instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, Int

from polygpt.errors import PolygptError
from polygpt.inspection.programs import padded, programs_of
from polygpt.model import Model, Params


@dataclass(frozen=True)
class TokenScores:
    """The model's distribution after each of T tokens, in nats. Entry t predicts token t + 1.

    Attributes:
        logprobs: of the tokens that follow, float32 [T-1].
        ranks: how many tokens were likelier than the one that follows, [T-1].
        entropies: float32 [T].
        top_tokens, top_logprobs: the likeliest tokens, the likeliest first, [T, k].
    """

    logprobs: Float[np.ndarray, " T-1"]
    ranks: Int[np.ndarray, " T-1"]
    entropies: Float[np.ndarray, " T"]
    top_tokens: Int[np.ndarray, "T k"]
    top_logprobs: Float[np.ndarray, "T k"]


def score_tokens(model: Model, params: Params, ids: Sequence[int], top: int = 10) -> TokenScores:
    """The scores of `ids`, of which there is at least one and no more than the context holds.

    Raises:
        PolygptError: a score is not a finite number.
    """
    tokens, count = padded(ids, model.config), len(ids)
    targets = np.roll(tokens[0], -1)
    k = min(top, model.config.vocab_size)
    judged = jax.device_get(programs_of(model.config).scores(params, tokens, targets, k))
    found = TokenScores(
        judged.logprob[: count - 1],
        judged.rank[: count - 1],
        judged.entropy[:count],
        judged.top_tokens[:count],
        judged.top_logprobs[:count],
    )
    if not all(np.isfinite(part).all() for part in (found.logprobs, found.entropies, found.top_logprobs)):
        raise PolygptError("a log probability is not a finite number: the model's weights are damaged or overflow")
    return found
