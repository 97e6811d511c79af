"""What changes logits before the temperature: bias, penalties on repetition, minimum length.

All of it is computed from a row's own tokens, so that nothing depends on the rows beside it. Rows that ask for nothing
keep their logits to the bit, and a batch in which no row asks for anything skips it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from polygpt.generation.sampling import Sampler


class Penalties(NamedTuple):
    """The settings of B sequences, one row each; `Sampler` says what they mean.

    Attributes:
        asked: the row has any of them, or a bias.
    """

    asked: Bool[Array, "B"]
    repetition: Float[Array, "B"]
    presence: Float[Array, "B"]
    frequency: Float[Array, "B"]
    ngram: Int[Array, "B"]
    min_new_tokens: Int[Array, "B"]


class History(NamedTuple):
    """The tokens of B sequences so far.

    Attributes:
        tokens: prompt and generated tokens, from index 0.
        length: how many there are.
        prompt: how many of them are the prompt's.
    """

    tokens: Int[Array, "B L"]
    length: Int[Array, "B"]
    prompt: Int[Array, "B"]


def stack_penalties(samplers: Sequence[Sampler]) -> Penalties:
    """The settings of several sequences as arrays."""

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(sampler, name) for sampler in samplers], dtype)

    return Penalties(
        column("edits_logits", bool),
        column("repetition_penalty", np.float32),
        column("presence_penalty", np.float32),
        column("frequency_penalty", np.float32),
        column("no_repeat_ngram", np.int32),
        column("min_new_tokens", np.int32),
    )


def edit_logits(
    logits: Float[Array, "B V"],
    penalties: Penalties,
    history: History,
    stop_tokens: Int[Array, "B S"],
    bias: Float[Array, "B V"],
) -> Float[Array, "B V"]:
    """The logits with bias and penalties; unchanged where nothing is asked for."""

    def edit() -> Array:
        edited = penalize(logits + bias, penalties, history)
        banned = lax.cond(
            (penalties.ngram > 0).any(),
            lambda: repeated_ngrams(history, penalties.ngram, logits.shape[-1]),
            lambda: jnp.zeros(logits.shape, bool),
        )
        early = history.length - history.prompt < penalties.min_new_tokens
        banned |= _marked(stop_tokens, (stop_tokens >= 0) & early[:, None], logits.shape[-1])
        possible = jnp.where(banned, -jnp.inf, edited)
        # Where every token is banned, none is: the sequence has to go on.
        edited = jnp.where((possible > -jnp.inf).any(-1, keepdims=True), possible, edited)
        return jnp.where(penalties.asked[:, None], edited, logits)

    return lax.cond(penalties.asked.any(), edit, lambda: logits)


def penalize(logits: Float[Array, "B V"], penalties: Penalties, history: History) -> Float[Array, "B V"]:
    """The penalties on repetition, presence and frequency."""
    repetition, presence, frequency = (setting[:, None] for setting in penalties[1:4])
    index = jnp.arange(history.tokens.shape[1])
    written = index < history.length[:, None]
    seen = _marked(history.tokens, written, logits.shape[-1])
    generated = written & (index >= history.prompt[:, None])
    rows = jnp.arange(len(logits))[:, None]
    places = jnp.where(generated, history.tokens, logits.shape[-1])
    counts = jnp.zeros(logits.shape, jnp.float32).at[rows, places].add(1, mode="drop")
    logits = jnp.where(seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - presence * (counts > 0) - frequency * counts


def repeated_ngrams(history: History, ngram: Int[Array, "B"], vocab: int) -> Bool[Array, "B V"]:
    """The tokens that would complete, for a second time, a run of `ngram` tokens; none where that is 0."""
    tokens, length = history.tokens, history.length[:, None]
    index = jnp.arange(tokens.shape[1])
    n = ngram[:, None]
    ends = (n > 0) & (index >= n - 1) & (index < length)  # where such a run may have ended

    def compare(distance: Array, ends: Array) -> Array:
        """Keeps those runs whose token at `distance` before the end is that of the sequence's own end."""
        last = jnp.take_along_axis(tokens, jnp.maximum(length - distance, 0), axis=1)
        return ends & ((distance >= n) | (jnp.roll(tokens, distance, axis=1) == last))

    ends = lax.fori_loop(1, jnp.minimum(ngram.max(), tokens.shape[1]), compare, ends)  # a longer run never ended
    return _marked(tokens, ends, vocab)


def _marked(tokens: Int[Array, "B L"], where: Bool[Array, "B L"], vocab: int) -> Bool[Array, "B V"]:
    """Which ids are among a row's tokens, as far as `where` says that they count."""
    rows = jnp.arange(len(tokens))[:, None]
    return jnp.zeros((len(tokens), vocab), bool).at[rows, jnp.where(where, tokens, vocab)].set(True, mode="drop")
