"""The log probabilities of a prompt's own tokens, for `echo`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from polygpt.errors import PolygptError
from polygpt.generation import Logprob
from polygpt.language_model import LanguageModel
from polygpt.model import ModelConfig, Params, model_of
from polygpt.server.schemas import MOST_LOGPROBS

# Positions whose logits, float32 [ROWS, V], are computed at a time.
ROWS = 128


def score_prompt(lm: LanguageModel, tokens: list[int], top: int) -> list[Logprob | None]:
    """The log probability of each token after those before it, and of the `top` likeliest; None for the first.

    Raises:
        PolygptError: one is not a number.
    """
    width = min(-(-len(tokens) // ROWS) * ROWS, lm.config.context_length)
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(tokens)] = tokens
    own, ids, values = (np.asarray(part) for part in _program(lm.config)(lm.params, padded))
    scores: list[Logprob | None] = [None]
    for place in range(len(tokens) - 1):
        if not np.isfinite(own[place]):
            raise PolygptError("a log probability of the prompt is not a finite number: the weights are damaged")
        best = zip(ids[place, :top].tolist(), values[place, :top].tolist(), strict=True)
        scores.append(Logprob(float(own[place]), tuple(best)))
    return scores


@lru_cache(maxsize=16)
def _program(config: ModelConfig) -> Any:
    model = model_of(config)

    @jax.jit
    def score(params: Params, tokens: Array) -> tuple[Array, Array, Array]:
        """Of tokens [1, T]: ln p of each after the first [T], the likeliest ids and their ln p [T, k]."""
        decoder = model.module(params)
        hidden = decoder(tokens).hidden[0]
        length = hidden.shape[0]
        room = -(-length // ROWS) * ROWS
        hidden = jnp.pad(hidden, ((0, room - length), (0, 0)))
        target = jnp.pad(tokens[0, 1:], (0, room - length + 1))

        def rows(part: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            log_p = jax.nn.log_softmax(decoder.logits(part[0]).astype(jnp.float32))
            best, ids = lax.top_k(log_p, min(MOST_LOGPROBS, log_p.shape[-1]))
            return jnp.take_along_axis(log_p, part[1][:, None], axis=1)[:, 0], ids, best

        split = hidden.reshape(-1, ROWS, hidden.shape[-1]), target.reshape(-1, ROWS)
        own, ids, best = lax.map(rows, split)
        return own.reshape(-1), ids.reshape(room, -1), best.reshape(room, -1)

    return score
