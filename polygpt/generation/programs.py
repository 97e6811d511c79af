"""The two compiled functions of generation: `prefill` reads the prompts, `decode` continues them token by token.

Whatever differs between requests is an argument, so programs are compiled per model and per shape only.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from polygpt.generation.sampling import NOT_FINITE, Sampling, sample, token_keys
from polygpt.model import Decoder, ModelConfig, Params, model_of

# Tokens decoded before the host looks at them (for streaming and stop strings).
CHUNK = 16


class Settings(NamedTuple):
    """What each of B rows asks for.

    Attributes:
        sampling: how its tokens are chosen.
        seed: of its random numbers.
        limit: tokens in the sequence, prompt included, at which it ends.
        stop_tokens: ids that end it; filled up with ids that no token has.
    """

    sampling: Sampling
    seed: UInt32[Array, "B"]
    limit: Int[Array, "B"]
    stop_tokens: Int[Array, "B S"]


class Progress(NamedTuple):
    """Where B sequences stand.

    Attributes:
        token: the last token of each row, which the model has not seen yet; `NOT_FINITE` if its logits were not finite.
        position: the index of that token in its sequence.
        state: the decoding state after everything before it.
        done: the row has reached its limit or a stop token, or failed; its token and position stay as they are.
    """

    token: Int[Array, "B"]
    position: Int[Array, "B"]
    state: PyTree
    done: Bool[Array, "B"]


class Programs(NamedTuple):
    """The compiled functions of one model.

    prefill(params, tokens [B, T], lengths [B], settings, state) -> Progress: reads prompts, padded on the right, and
        samples the first new token of each.
    decode(params, progress, settings) -> (Progress, tokens [B, CHUNK]): up to `CHUNK` tokens more; fewer once every row
        is done.

    Both reuse the memory of the state they are given.
    """

    prefill: jax.stages.Wrapped
    decode: jax.stages.Wrapped


@lru_cache(maxsize=16)
def programs_of(config: ModelConfig) -> Programs:
    """The compiled functions of one configuration, shared by all models that have it."""
    model = model_of(config)

    @partial(jax.jit, donate_argnums=4)
    def prefill(params: Params, tokens: Array, lengths: Array, settings: Settings, state: PyTree) -> Progress:
        decoder = model.module(params)
        valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
        output = decoder(tokens, state=state, valid=valid, fresh=True)
        last = jnp.take_along_axis(output.hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        token, done = _next_token(decoder, last, lengths, settings)
        return Progress(token, lengths, output.state, done)

    @partial(jax.jit, donate_argnums=1)
    def decode(params: Params, progress: Progress, settings: Settings) -> tuple[Progress, Array]:
        decoder = model.module(params)
        tokens = jnp.zeros((len(progress.token), CHUNK), jnp.int32)

        def unfinished(carry: tuple[Array, Array, Progress]) -> Array:
            index, _, progress = carry
            return (index < CHUNK) & ~progress.done.all()

        def step(carry: tuple[Array, Array, Progress]) -> tuple[Array, Array, Progress]:
            index, tokens, (token, position, state, done) = carry
            output = decoder(token[:, None], positions=position[:, None], state=state)
            new, ends = _next_token(decoder, output.hidden[:, 0], position + 1, settings)
            token, position = jnp.where(done, token, new), jnp.where(done, position, position + 1)
            progress = Progress(token, position, output.state, done | ends)
            return index + 1, tokens.at[:, index].set(token), progress

        _, tokens, progress = lax.while_loop(unfinished, step, (jnp.int32(0), tokens, progress))
        return progress, tokens

    return Programs(prefill, decode)


def _next_token(
    decoder: Decoder, hidden: Float[Array, "B D"], position: Int[Array, "B"], settings: Settings
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """The token sampled for `position` of each row, and whether the row ends with it."""
    token = sample(decoder.logits(hidden), settings.sampling, token_keys(settings.seed, position))
    stops = (token[:, None] == settings.stop_tokens).any(axis=1)
    return token, stops | (token == NOT_FINITE) | (position + 1 >= settings.limit)
