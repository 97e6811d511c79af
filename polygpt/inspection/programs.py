"""The compiled functions behind inspection, one set for each model configuration."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from polygpt.model import Decoder, ModelConfig, Params, model_of

# Positions whose logits, float32 [ROWS, V], are held at a time.
ROWS = 128
SHORTEST = 16


class Judged(NamedTuple):
    """Distributions over the vocabulary, in nats, and where a given token stands in each.

    Attributes:
        logprob: of the given token.
        rank: how many tokens are likelier than the given one.
        entropy: of the distribution.
        top_tokens, top_logprobs: the likeliest tokens, the likeliest first.
    """

    logprob: Float[Array, "*M"]
    rank: Int[Array, "*M"]
    entropy: Float[Array, "*M"]
    top_tokens: Int[Array, "*M k"]
    top_logprobs: Float[Array, "*M k"]


class Programs(NamedTuple):
    """What is compiled; tokens are [1, T], padded on the right, which no earlier position sees.

    scores(params, tokens, targets [T], k): `Judged` [T].
    lens(params, tokens, targets [count], start, k): `Judged` [layers, count], positions start to start + count.
    attention(params, tokens): for each layer its heads' weights, as bytes [N, T, T] (`decode_weights`), or None.
    experts(params, tokens): for each layer the experts' shares, [T, E], or None.
    """

    scores: jax.stages.Wrapped
    lens: jax.stages.Wrapped
    attention: jax.stages.Wrapped
    experts: jax.stages.Wrapped


@lru_cache(maxsize=16)
def programs_of(config: ModelConfig) -> Programs:
    """The functions of one configuration, compiled once for each padded length."""
    model = model_of(config)

    def scores(params: Params, tokens: Array, targets: Array, k: int) -> Judged:
        decoder = model.module(params)
        hidden = decoder(tokens).hidden[0]
        rows = min(ROWS, len(hidden))
        padding = -len(hidden) % rows

        def some(inputs: tuple[Array, Array]) -> Judged:
            return _judge(decoder, *inputs, k)

        hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, rows, hidden.shape[-1])
        judged = lax.map(some, (hidden, jnp.pad(targets, (0, padding)).reshape(-1, rows)))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[: tokens.shape[1]], judged)

    def lens(params: Params, tokens: Array, targets: Array, start: Array, k: int) -> Judged:
        decoder = model.module(params)

        def window(residual: Array) -> Array:
            return lax.dynamic_slice_in_dim(residual, start, len(targets), axis=1)

        captured = decoder(tokens, capture={"residual": window}).captured
        residuals = jnp.stack([layer["residual"] for layer in captured])
        return lax.map(lambda residual: _judge(decoder, decoder.normalize(residual)[0], targets, k), residuals)

    def attention(params: Params, tokens: Array) -> list[Array | None]:
        captured = model.hidden(params, tokens, capture={"attention": lambda weights: _as_bytes(weights[0])}).captured
        return [layer.get("attention") for layer in captured]

    def experts(params: Params, tokens: Array) -> list[Array | None]:
        captured = model.hidden(params, tokens, capture={"experts": lambda shares: shares[0]}).captured
        return [layer.get("experts") for layer in captured]

    return Programs(
        jax.jit(scores, static_argnums=3), jax.jit(lens, static_argnums=4), jax.jit(attention), jax.jit(experts)
    )


def padded(ids: Sequence[int], config: ModelConfig) -> np.ndarray:
    """The ids as [1, T], T one of a few lengths, so that few programs are compiled."""
    length = SHORTEST
    while length < len(ids):
        length *= 2
    tokens = np.zeros((1, max(min(length, config.context_length), len(ids))), np.int32)
    tokens[0, : len(ids)] = ids
    return tokens


def _judge(decoder: Decoder, hidden: Float[Array, "M D"], targets: Int[Array, " M"], k: int) -> Judged:
    logprobs = jax.nn.log_softmax(decoder.logits(hidden))
    own = jnp.take_along_axis(logprobs, targets[:, None], axis=1)
    # Padding of the vocabulary has a logit of -1e30: exp is 0, and 0 · -1e30 must not become anything else.
    entropy = -(jnp.exp(logprobs) * jnp.maximum(logprobs, -1e4)).sum(-1)
    top_logprobs, top_tokens = lax.top_k(logprobs, k)
    return Judged(own[:, 0], (logprobs > own).sum(-1), entropy, top_tokens, top_logprobs)


def _as_bytes(weights: Float[Array, "N T S"]) -> Array:
    """255·sqrt(|weight|) to the nearest: the square root leaves small weights apart."""
    return jnp.round(255 * jnp.sqrt(jnp.minimum(jnp.abs(weights), 1))).astype(jnp.uint8)
