"""The compiled functions of the engine: prompts are read a chunk at a time, slots are decoded together.

Whatever differs between requests is an argument, so there is one program for each shape. A prompt is read in a state of
its own, one row, and then inserted into a slot; its last token is left for decoding, which samples all tokens.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from polygpt.generation import states
from polygpt.generation.penalties import History
from polygpt.generation.sampling import NOT_FINITE
from polygpt.generation.slot_settings import SlotSettings
from polygpt.generation.slots import Decoded, Masks, Slots, append_token, extend, next_token, nothing_decoded
from polygpt.model import Model, ModelConfig, Params, model_of

# Tokens that are appended to a sequence at once.
FORCED = 16


class SlotPrograms(NamedTuple):
    """The compiled functions of one configuration, length and vocabulary.

    restart(row) -> row: for a new sequence.
    prefill(params, row, tokens [1, T], start, count, fresh) -> row: after `count` more tokens, the first of their
        sequence if `fresh`, which is static.
    take(row, start) -> block; put(row, block, start) -> row: see `states`.
    insert(slots, row, tokens [L], length, slot, bias [V]) -> slots: with a prompt read up to its last token in a slot.
    insert_state(state, row, length, slot) -> state: the same for a decoding state alone.
    append(params, slots, slot, tokens [FORCED], count) -> slots: with tokens at the end of a sequence that were not
        sampled; the model reads all but the last.
    decode(params, slots, settings, active [B], most, until_free, masks) -> (slots, Decoded): up to `most` tokens a row;
        fewer if all rows are done, or one of them and `until_free`. `masks` hold for one token.
    verify(params, slots, settings, active [B], drafts [B, K], counts [B], masks) -> (slots, Decoded): as many of a
        row's drafted tokens as would have been sampled, and one more, in one pass.
    draft(params, state, slots, settings, active [B], steps) -> (state, drafts [B, steps]): what this model would
        sample, whose decoding state follows the sequences of another's `slots`; `steps` is static.
    """

    restart: jax.stages.Wrapped
    prefill: jax.stages.Wrapped
    take: jax.stages.Wrapped
    put: jax.stages.Wrapped
    insert: jax.stages.Wrapped
    insert_state: jax.stages.Wrapped
    append: jax.stages.Wrapped
    decode: jax.stages.Wrapped
    verify: jax.stages.Wrapped
    draft: jax.stages.Wrapped


@lru_cache(maxsize=16)
def slot_programs(config: ModelConfig, length: int, chunk: int, vocab: int) -> SlotPrograms:
    """The programs for sequences of `length` tokens; ids from `vocab` on are never sampled."""
    model = model_of(config)

    @partial(jax.jit, donate_argnums=0)
    def restart(row: PyTree) -> PyTree:
        return states.restart(row, model.init_state(1, length), length)

    @partial(jax.jit, donate_argnums=1, static_argnames="fresh")
    def prefill(params: Params, row: PyTree, tokens: Array, start: Array, count: Array, *, fresh: bool) -> PyTree:
        index = jnp.arange(tokens.shape[1])[None]
        output = model.hidden(
            params, tokens, positions=start + index, valid=index < count, state=row, fresh=fresh, for_state=True
        )
        return output.state

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

    @partial(jax.jit, donate_argnums=0)
    def insert_state(state: PyTree, row: PyTree, count: Array, slot: Array) -> PyTree:
        return states.insert(state, row, slot, count - 1, chunk, length)

    decoding = _append(model, length), _decode(model, vocab), _verify(model, vocab), _draft(model, length, vocab)
    return SlotPrograms(restart, prefill, take, put, insert, insert_state, *decoding)


def _append(model: Model, length: int) -> jax.stages.Wrapped:
    @partial(jax.jit, donate_argnums=1)
    def append(params: Params, slots: Slots, slot: Array, tokens: Array, count: Array) -> Slots:
        history, length_before = slots.history, slots.history.length[slot]
        index = jnp.arange(FORCED)
        last = history.tokens[slot, length_before - 1]
        read = jnp.concatenate([last[None], tokens[:-1]])[None]
        positions = (length_before - 1 + index)[None]
        row = states.row_of(slots.state, slot)
        valid = (index < count)[None]
        row = model.hidden(params, read, positions=positions, valid=valid, state=row, for_state=True).state
        places = jnp.where(index < count, length_before + index, length)
        history = history._replace(
            tokens=history.tokens.at[slot, places].set(tokens, mode="drop"),
            length=history.length.at[slot].add(count),
        )
        return slots._replace(history=history, state=states.with_row(slots.state, row, slot))

    return append


def _decode(model: Model, vocab: int) -> jax.stages.Wrapped:
    @partial(jax.jit, donate_argnums=1)
    def decode(
        params: Params,
        slots: Slots,
        settings: SlotSettings,
        active: Array,
        most: Array,
        until_free: Array,
        masks: Masks,
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
            last = jnp.maximum(slots.history.length - 1, 0)[:, None]
            newest = jnp.take_along_axis(slots.history.tokens, last, axis=1)
            # What is done keeps its length, and would make attention read as far for all.
            output = decoder(newest, positions=last, valid=~slots.done[:, None], state=slots.state)
            logits = decoder.logits(output.hidden[:, 0])
            slots, decoded, _ = extend(slots, decoded, logits, settings, masks, ~slots.done, vocab)
            return slots._replace(state=output.state), decoded

        return lax.while_loop(unfinished, step, (slots, nothing_decoded(*slots.bias.shape)))

    return decode


def _verify(model: Model, vocab: int) -> jax.stages.Wrapped:
    @partial(jax.jit, donate_argnums=1)
    def verify(
        params: Params, slots: Slots, settings: SlotSettings, active: Array, drafts: Array, counts: Array, masks: Masks
    ) -> tuple[Slots, Decoded]:
        decoder = model.module(params)
        slots = slots._replace(done=slots.done | ~active)
        last = jnp.maximum(slots.history.length - 1, 0)[:, None]
        newest = jnp.take_along_axis(slots.history.tokens, last, axis=1)
        index = jnp.arange(drafts.shape[1] + 1)
        output = decoder(
            jnp.concatenate([newest, drafts], axis=1),
            positions=last + index,
            valid=index <= counts[:, None],
            state=slots.state,
        )
        logits = decoder.logits(output.hidden)
        ahead = jnp.pad(drafts, ((0, 0), (0, 1)), constant_values=NOT_FINITE)

        def unfinished(carry: tuple[Slots, Decoded, Array]) -> Array:
            return carry[2].any()

        def step(carry: tuple[Slots, Decoded, Array]) -> tuple[Slots, Decoded, Array]:
            slots, decoded, agrees = carry
            at = decoded.steps
            slots, decoded, token = extend(slots, decoded, logits[:, at], settings, masks, agrees, vocab)
            return slots, decoded, agrees & ~slots.done & (at < counts) & (token == ahead[:, at])

        begin = slots._replace(state=None), nothing_decoded(*slots.bias.shape), ~slots.done
        after, decoded, _ = lax.while_loop(unfinished, step, begin)
        return after._replace(state=output.state), decoded

    return verify


def _draft(model: Model, length: int, vocab: int) -> jax.stages.Wrapped:
    @partial(jax.jit, donate_argnums=1, static_argnames="steps")
    def draft(
        params: Params, state: PyTree, slots: Slots, settings: SlotSettings, active: Array, *, steps: int
    ) -> tuple[PyTree, Array]:
        decoder = model.module(params)
        slots = slots._replace(done=slots.done | ~active, state=None)
        masks, wide = Masks.none(*slots.bias.shape), slots.bias.shape[1]

        def sample(slots: Slots, hidden: Array) -> tuple[Slots, Array]:
            logits = decoder.logits(hidden)[:, :wide]
            short = wide - logits.shape[1]  # either model may have more ids than the tokenizer that they share
            logits = jnp.pad(logits, ((0, 0), (0, short)), constant_values=-jnp.inf)
            token = next_token(logits, settings, slots.history, slots.bias, masks, vocab)
            return slots._replace(history=append_token(slots.history, token, ~slots.done)), jnp.maximum(token, 0)

        # The last two tokens are read: of the last round the model may have seen all but these.
        begin = jnp.maximum(slots.history.length - 2, 0)[:, None]
        places = begin + jnp.arange(2)
        tokens = jnp.take_along_axis(slots.history.tokens, places, axis=1)
        valid = places < slots.history.length[:, None]
        output = decoder(tokens, positions=places, valid=valid, state=state)
        newest = jnp.maximum(valid.sum(1) - 1, 0)
        slots, first = sample(slots, jnp.take_along_axis(output.hidden, newest[:, None, None], axis=1)[:, 0])

        def step(carry: tuple[PyTree, Slots, Array], _: None) -> tuple[tuple[PyTree, Slots, Array], Array]:
            state, slots, token = carry
            position = jnp.clip(slots.history.length - 1, 0, length - 1)[:, None]
            output = decoder(token[:, None], positions=position, state=state)
            slots, token = sample(slots, output.hidden[:, 0])
            return (output.state, slots, token), token

        (state, _, _), rest = lax.scan(step, (output.state, slots, first), length=steps - 1)
        return state, jnp.concatenate([first[:, None], rest.T], axis=1)

    return draft
