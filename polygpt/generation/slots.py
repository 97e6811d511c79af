"""The compiled functions of the engine: prompts are read a chunk at a time, slots are decoded together.

Whatever differs between requests is an argument, so there is one program for each shape. A prompt is read in a state of
its own, one row, and then inserted into a slot; its last token is left for decoding, which samples all tokens.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from polygpt.generation import states
from polygpt.generation.asking import Asked
from polygpt.generation.engine import MOST_LOGPROBS
from polygpt.generation.penalties import History, edit_logits
from polygpt.generation.programs import CHUNK
from polygpt.generation.sampling import NOT_FINITE, are_finite, choose, token_keys
from polygpt.model import ModelConfig, Params, model_of

# Tokens that are appended to a sequence at once.
FORCED = 16


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
    """What up to `CHUNK` steps gave; the columns from `steps` on are zeros.

    Attributes:
        tokens: `NOT_FINITE` where logits were not finite.
        logprobs: of these tokens by the model alone, in nats.
        top_tokens, top_logprobs: the likeliest tokens, first the likeliest.
    """

    steps: Int[Array, ""]
    tokens: Int[Array, "B C"]
    logprobs: Float[Array, "B C"]
    top_tokens: Int[Array, "B C k"]
    top_logprobs: Float[Array, "B C k"]


class SlotPrograms(NamedTuple):
    """The compiled functions of one configuration, length and vocabulary.

    restart(row) -> row: for a new sequence.
    prefill(params, row, tokens [1, T], start, count) -> row: after `count` more tokens.
    take(row, start) -> block; put(row, block, start) -> row: see `states`.
    insert(slots, row, tokens [L], length, slot, bias [V]) -> slots: with a prompt read up to its last token in a slot.
    append(params, slots, slot, tokens [FORCED], count) -> slots: with tokens at the end of a sequence that were not
        sampled; the model reads all but the last.
    decode(params, slots, asked, active [B], most, until_free, masks) -> (slots, Decoded): up to `most` tokens a row;
        fewer if all rows are done, or one of them and `until_free`. `masks` hold for one token.
    """

    restart: jax.stages.Wrapped
    prefill: jax.stages.Wrapped
    take: jax.stages.Wrapped
    put: jax.stages.Wrapped
    insert: jax.stages.Wrapped
    append: jax.stages.Wrapped
    decode: jax.stages.Wrapped


@lru_cache(maxsize=16)
def slot_programs(config: ModelConfig, length: int, chunk: int, vocab: int) -> SlotPrograms:
    """The programs for sequences of `length` tokens; ids from `vocab` on are never sampled."""
    model = model_of(config)

    @partial(jax.jit, donate_argnums=0)
    def restart(row: PyTree) -> PyTree:
        return states.restart(row, model.init_state(1, length), length)

    @partial(jax.jit, donate_argnums=1)
    def prefill(params: Params, row: PyTree, tokens: Array, start: Array, count: Array) -> PyTree:
        index = jnp.arange(tokens.shape[1])[None]
        return model.hidden(params, tokens, positions=start + index, valid=index < count, state=row).state

    @jax.jit
    def take(row: PyTree, start: Array) -> list[Array]:
        return states.take_block(row, start, chunk, length)

    @partial(jax.jit, donate_argnums=0)
    def put(row: PyTree, block: list[Array], start: Array) -> PyTree:
        return states.put_block(row, block, start, length)

    @partial(jax.jit, donate_argnums=0)
    def insert(slots: Slots, row: PyTree, tokens: Array, count: Array, slot: Array, bias: Array) -> Slots:
        history = History(
            slots.history.tokens.at[slot].set(tokens),
            slots.history.length.at[slot].set(count),
            slots.history.prompt.at[slot].set(count),
        )
        state = states.insert(slots.state, row, slot, count - 1, chunk, length)
        return Slots(history, slots.done.at[slot].set(False), state, slots.bias.at[slot].set(bias))

    @partial(jax.jit, donate_argnums=1)
    def append(params: Params, slots: Slots, slot: Array, tokens: Array, count: Array) -> Slots:
        history, length_before = slots.history, slots.history.length[slot]
        index = jnp.arange(FORCED)
        last = history.tokens[slot, length_before - 1]
        read = jnp.concatenate([last[None], tokens[:-1]])[None]
        positions = (length_before - 1 + index)[None]
        row = states.row_of(slots.state, slot)
        row = model.hidden(params, read, positions=positions, valid=(index < count)[None], state=row).state
        places = jnp.where(index < count, length_before + index, length)
        history = history._replace(
            tokens=history.tokens.at[slot, places].set(tokens, mode="drop"),
            length=history.length.at[slot].add(count),
        )
        return slots._replace(history=history, state=states.with_row(slots.state, row, slot))

    @partial(jax.jit, donate_argnums=1)
    def decode(
        params: Params, slots: Slots, asked: Asked, active: Array, most: Array, until_free: Array, masks: Masks
    ) -> tuple[Slots, Decoded]:
        decoder = model.module(params)
        slots = slots._replace(done=slots.done | ~active)
        before = slots.done

        def unfinished(carry: tuple[Slots, Decoded]) -> Array:
            slots, decoded = carry
            freed = until_free & (slots.done & ~before).any()
            return (decoded.steps < most) & ~slots.done.all() & ~freed

        def step(carry: tuple[Slots, Decoded]) -> tuple[Slots, Decoded]:
            slots, decoded = carry
            history, done, state, bias = slots
            last = jnp.maximum(history.length - 1, 0)[:, None]
            output = decoder(jnp.take_along_axis(history.tokens, last, axis=1), positions=last, state=state)
            logits = decoder.logits(output.hidden[:, 0])
            token = _next_token(logits, asked, history, bias, masks, vocab)
            decoded = _record(decoded, token, logits, asked.logprobs)
            place = jnp.where(done, length, history.length)
            tokens = history.tokens.at[jnp.arange(len(done)), place].set(token, mode="drop")
            history = history._replace(tokens=tokens, length=history.length + ~done)
            ends = (token[:, None] == asked.stop_tokens).any(axis=1) | (token == NOT_FINITE)
            return Slots(history, done | ends | (history.length >= asked.limit), output.state, bias), decoded

        return lax.while_loop(unfinished, step, (slots, _nothing_decoded(*slots.bias.shape)))

    return SlotPrograms(restart, prefill, take, put, insert, append, decode)


def empty_slots(config: ModelConfig, count: int, length: int) -> Slots:
    """Free slots."""
    zeros = jnp.zeros(count, jnp.int32)
    history = History(jnp.zeros((count, length), jnp.int32), zeros, jnp.zeros(count, jnp.int32))
    bias = jnp.zeros((count, config.vocab_size), jnp.float32)
    return Slots(history, jnp.ones(count, bool), model_of(config).init_state(count, length), bias)


def _next_token(
    logits: Float[Array, "B V"], asked: Asked, history: History, bias: Float[Array, "B V"], masks: Masks, vocab: int
) -> Int[Array, "B"]:
    """The next token of each row, `NOT_FINITE` where there is none."""
    finite = are_finite(logits)
    edited = edit_logits(logits, asked.penalties, history, asked.stop_tokens, bias)
    edited = lax.cond(masks.given, lambda: _mask(edited, logits, masks.words), lambda: edited)
    if vocab < logits.shape[-1]:
        edited = jnp.where(jnp.arange(logits.shape[-1]) < vocab, edited, -jnp.inf)
    keys = token_keys(asked.seed, history.length)
    return jnp.where(finite, choose(edited, asked.sampling, keys), NOT_FINITE)


def _mask(edited: Float[Array, "B V"], logits: Float[Array, "B V"], words: UInt32[Array, "B W"]) -> Float[Array, "B V"]:
    """Ids that are not allowed at -inf. Where penalties ban all that are, penalties do not count."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    allowed = bits.reshape(len(words), -1)[:, : logits.shape[-1]] == 1
    masked = jnp.where(allowed, edited, -jnp.inf)
    possible = (masked > -jnp.inf).any(-1, keepdims=True)
    return jnp.where(possible, masked, jnp.where(allowed, logits, -jnp.inf))


def _nothing_decoded(rows: int, vocab: int) -> Decoded:
    tops = (rows, CHUNK, min(MOST_LOGPROBS, vocab))
    zeros = jnp.zeros((rows, CHUNK), jnp.int32)
    return Decoded(
        jnp.int32(0), zeros, zeros.astype(jnp.float32), jnp.zeros(tops, jnp.int32), jnp.zeros(tops, jnp.float32)
    )


def _record(
    decoded: Decoded, token: Int[Array, "B"], logits: Float[Array, "B V"], logprobs: Int[Array, "B"]
) -> Decoded:
    """`decoded` with one step more, and log probabilities if any row wants them."""
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
        decoded.tokens.at[:, at].set(token),
        decoded.logprobs.at[:, at].set(chosen),
        decoded.top_tokens.at[:, at].set(top_tokens),
        decoded.top_logprobs.at[:, at].set(top_logprobs),
    )
