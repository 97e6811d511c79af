"""Where the sequences in the slots stand, and how one token more is sampled for them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from polygpt.generation.penalties import History, edit_logits
from polygpt.generation.requests import MOST_LOGPROBS
from polygpt.generation.sampling import NOT_FINITE, are_finite, choose, token_keys
from polygpt.generation.slot_settings import SlotSettings
from polygpt.model import ModelConfig, model_of

# Tokens that are decoded before the host looks at them, at most.
CHUNK = 16


class Slots(NamedTuple):
    """Where B sequences stand.

    Attributes:
        history: the tokens of each; the last one was not seen by the model yet.
        done: the slot is free, or its sequence has ended: it stands still.
        state: the decoding state after everything before the last token.
        bias: of logits.
    """

    history: History
    done: Bool[Array, "B"]
    state: PyTree
    bias: Float[Array, "B V"]


class Masks(NamedTuple):
    """Which ids each of B rows may sample, a bit each: id 32 i + j is bit j of word i.

    Attributes:
        given: some row may not sample all; otherwise `words` are not looked at.
    """

    given: Bool[Array, ""]
    words: UInt32[Array, "B W"]

    @classmethod
    def none(cls, rows: int, vocab: int) -> Masks:
        """Every row may sample every id."""
        return cls(np.False_, np.full((rows, -(-vocab // 32)), 2**32 - 1, np.uint32))


class Decoded(NamedTuple):
    """What up to `CHUNK` steps gave.

    Attributes:
        steps: that were taken.
        counts: tokens of each row; later columns mean nothing.
        tokens: `NOT_FINITE` where logits were not finite.
        logprobs: of these tokens by the model alone, in nats.
        top_tokens, top_logprobs: the likeliest tokens, first the likeliest.
    """

    steps: Int[Array, ""]
    counts: Int[Array, "B"]
    tokens: Int[Array, "B C"]
    logprobs: Float[Array, "B C"]
    top_tokens: Int[Array, "B C k"]
    top_logprobs: Float[Array, "B C k"]


def empty_slots(config: ModelConfig, count: int, length: int) -> Slots:
    """Free slots."""
    zeros = jnp.zeros(count, jnp.int32)
    history = History(jnp.zeros((count, length), jnp.int32), zeros, jnp.zeros(count, jnp.int32))
    bias = jnp.zeros((count, config.vocab_size), jnp.float32)
    return Slots(history, jnp.ones(count, bool), model_of(config).init_state(count, length), bias)


def extend(
    slots: Slots,
    decoded: Decoded,
    logits: Float[Array, "B V"],
    settings: SlotSettings,
    masks: Masks,
    rows: Bool[Array, "B"],
    vocab: int,
) -> tuple[Slots, Decoded, Int[Array, "B"]]:
    """One token more for those `rows`; also the tokens."""
    token = next_token(logits, settings, slots.history, slots.bias, masks, vocab)
    decoded = _record(decoded, token, logits, settings.logprobs, rows)
    history = append_token(slots.history, token, rows)
    ends = (
        (token[:, None] == settings.stop_tokens).any(axis=1)
        | (token == NOT_FINITE)
        | (history.length >= settings.limit)
    )
    return slots._replace(history=history, done=slots.done | (rows & ends)), decoded, token


def append_token(history: History, token: Int[Array, "B"], rows: Bool[Array, "B"]) -> History:
    """The history with a token more in those rows; one beyond its room is dropped."""
    count, room = history.tokens.shape
    place = jnp.where(rows, history.length, room)
    tokens = history.tokens.at[jnp.arange(count), place].set(token, mode="drop")
    return history._replace(tokens=tokens, length=history.length + rows)


def next_token(
    logits: Float[Array, "B V"],
    settings: SlotSettings,
    history: History,
    bias: Float[Array, "B V"],
    masks: Masks,
    vocab: int,
) -> Int[Array, "B"]:
    """The next token of each row, `NOT_FINITE` where there is none."""
    if vocab < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab, logits, -jnp.inf)
    finite = are_finite(logits)
    edited = edit_logits(logits, settings.penalties, history, settings.stop_tokens, bias)
    edited = lax.cond(masks.given, lambda: _mask(edited, logits, masks.words), lambda: edited)
    keys = token_keys(settings.seed, history.length)
    return jnp.where(finite, choose(edited, settings.sampling, keys), NOT_FINITE)


def _mask(edited: Float[Array, "B V"], logits: Float[Array, "B V"], words: UInt32[Array, "B W"]) -> Float[Array, "B V"]:
    """Ids that are not allowed at -inf. Where penalties ban all that are, penalties do not count."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    allowed = bits.reshape(len(words), -1)[:, : logits.shape[-1]] == 1
    masked = jnp.where(allowed, edited, -jnp.inf)
    possible = (masked > -jnp.inf).any(-1, keepdims=True)
    return jnp.where(possible, masked, jnp.where(allowed, logits, -jnp.inf))


def nothing_decoded(rows: int, vocab: int) -> Decoded:
    """Room for what `CHUNK` steps give."""
    tops = (rows, CHUNK, min(MOST_LOGPROBS, vocab))
    tokens = jnp.zeros((rows, CHUNK), jnp.int32)
    logprobs = tokens.astype(jnp.float32), jnp.zeros(tops, jnp.int32), jnp.zeros(tops, jnp.float32)
    return Decoded(jnp.int32(0), jnp.zeros(rows, jnp.int32), tokens, *logprobs)


def _record(
    decoded: Decoded,
    token: Int[Array, "B"],
    logits: Float[Array, "B V"],
    logprobs: Int[Array, "B"],
    rows: Bool[Array, "B"],
) -> Decoded:
    """`decoded` with one step more, in which those `rows` took part, and log probabilities if any row wants them."""
    count = decoded.top_tokens.shape[-1]

    def score() -> tuple[Array, Array, Array]:
        own = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(own, jnp.maximum(token, 0)[:, None], axis=1)[:, 0]
        nothing = jnp.zeros((len(token), count), jnp.float32), jnp.zeros((len(token), count), jnp.int32)
        best = lax.cond((logprobs > 0).any(), lambda: tuple(lax.top_k(own, count)), lambda: nothing)
        return chosen, best[1], best[0]

    def skip() -> tuple[Array, Array, Array]:
        step = decoded.logprobs[:, 0], decoded.top_tokens[:, 0], decoded.top_logprobs[:, 0]
        return jax.tree.map(jnp.zeros_like, step)

    chosen, top_tokens, top_logprobs = lax.cond((logprobs >= 0).any(), score, skip)
    at = decoded.steps
    return Decoded(
        at + 1,
        decoded.counts + rows,
        decoded.tokens.at[:, at].set(token),
        decoded.logprobs.at[:, at].set(chosen),
        decoded.top_tokens.at[:, at].set(top_tokens),
        decoded.top_logprobs.at[:, at].set(top_logprobs),
    )
