"""The two compiled functions of beam search: `start` reads the prompt, `advance` takes up to `STEPS` steps.

Axis letters: G groups, K beams of a group, V vocabulary, N new tokens that there is room for.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from polygpt.model import ModelConfig, Params, model_of

# Steps that are taken before the host looks at the search, and so before an interruption is noticed.
STEPS = 16
# The values of `early_stopping`; a program is told the index.
EARLY = (False, True, "never")


class Rules(NamedTuple):
    """What a search is asked for; all of it data, so that no value compiles anything.

    Attributes:
        prompt: tokens of the prompt.
        budget: new tokens at most.
        vocab_size: ids from here on are never taken.
        stop_tokens: ids that end a continuation; filled up with ids that no token has.
        length_penalty, diversity_penalty: as `BeamSettings`.
        early_stopping: an index into `EARLY`.
    """

    prompt: Int[Array, ""]
    budget: Int[Array, ""]
    vocab_size: Int[Array, ""]
    stop_tokens: Int[Array, "S"]
    length_penalty: Float[Array, ""]
    diversity_penalty: Float[Array, ""]
    early_stopping: Int[Array, ""]


class Ended(NamedTuple):
    """The best continuations that have ended; score -inf where there is none. A stop token counts in all three."""

    tokens: Int[Array, "G K N"]
    scores: Float[Array, "G K"]
    lengths: Int[Array, "G K"]


class Search(NamedTuple):
    """Where a search stands.

    Attributes:
        tokens: the beams' new tokens; the model has not seen the last of them.
        totals: the sums of their log probabilities, sorted; -inf for a beam that stands for nothing.
        ended: the best continuations that have ended.
        open: the group may still find something better.
        length: new tokens of every beam.
        state: the decoding state, with a row for each beam.
        finite: no logits have been NaN or infinite.
    """

    tokens: Int[Array, "G K N"]
    totals: Float[Array, "G K"]
    ended: Ended
    open: Bool[Array, "G"]
    length: Int[Array, ""]
    state: PyTree
    finite: Bool[Array, ""]


class BeamPrograms(NamedTuple):
    """start(params, tokens [1, T], rules, state) -> Search; advance(params, search, rules) -> Search."""

    start: jax.stages.Wrapped
    advance: jax.stages.Wrapped


@lru_cache(maxsize=16)
def beam_programs(config: ModelConfig, groups: int, each: int, room: int) -> BeamPrograms:
    """The compiled functions for searches of `groups` · `each` beams with room for `room` new tokens."""
    model = model_of(config)
    shape = (groups, each)

    @jax.jit
    def start(params: Params, tokens: Array, rules: Rules, state: PyTree) -> Search:
        decoder = model.module(params)
        valid = jnp.arange(tokens.shape[1]) < rules.prompt
        output = decoder(tokens, state=state, valid=valid[None], fresh=True)
        logits = decoder.logits(output.hidden[0, rules.prompt - 1])
        nothing = jnp.zeros((*shape, room), jnp.int32)
        search = Search(
            tokens=nothing,
            # The beams are still equal: one of each group stands for all.
            totals=jnp.full(shape, -jnp.inf).at[:, 0].set(0.0),
            ended=Ended(nothing, jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32)),
            open=jnp.ones(groups, bool),
            length=jnp.int32(0),
            state=jax.tree.map(lambda leaf: jnp.repeat(leaf, groups * each, axis=1), output.state),
            finite=jnp.array(True),
        )
        return _extend(search, jnp.broadcast_to(logits, (*shape, logits.shape[-1])), rules)

    @partial(jax.jit, donate_argnums=1)
    def advance(params: Params, search: Search, rules: Rules) -> Search:
        decoder = model.module(params)
        last = jnp.minimum(search.length + STEPS, rules.budget)

        def step(search: Search) -> Search:
            newest = lax.dynamic_index_in_dim(search.tokens, search.length - 1, axis=2, keepdims=False)
            position = jnp.full((groups * each, 1), rules.prompt + search.length - 1)
            output = decoder(newest.reshape(-1, 1), positions=position, state=search.state)
            logits = decoder.logits(output.hidden[:, 0])
            return _extend(search._replace(state=output.state), logits.reshape(*shape, -1), rules)

        return lax.while_loop(lambda s: s.open.any() & s.finite & (s.length < last), step, search)

    return BeamPrograms(start, advance)


def _extend(search: Search, logits: Float[Array, "G K V"], rules: Rules) -> Search:
    """Every beam continued by one token. The groups choose in turn, each away from what earlier ones have taken."""
    real = jnp.isfinite(search.totals)
    fine = ((logits < jnp.inf).all(-1) & (logits > -jnp.inf).any(-1)) | ~real
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    log_probs = jnp.where(jnp.arange(logits.shape[-1]) < rules.vocab_size, log_probs, -jnp.inf)
    length = search.length + 1

    def choose(taken: Array, group: tuple) -> tuple[Array, tuple]:
        tokens, totals, ended, is_open, log_probs = group
        chosen, after = _extend_group(tokens, totals, ended, is_open, log_probs, taken, length, rules)
        return taken.at[chosen].add(jnp.isfinite(after[1])), after

    taken = jnp.zeros(logits.shape[-1])
    groups = search.tokens, search.totals, search.ended, search.open, log_probs
    _, (tokens, totals, ended, is_open, parents) = lax.scan(choose, taken, groups)
    rows = (parents + jnp.arange(len(parents))[:, None] * parents.shape[1]).ravel()
    # A state's leaves are stacked over layers: rows are on the second axis.
    state = jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=1), search.state)
    return Search(tokens, totals, ended, is_open, length, state, search.finite & fine.all())


def _extend_group(
    tokens: Int[Array, "K N"],
    totals: Float[Array, "K"],
    ended: Ended,
    is_open: Bool[Array, ""],
    log_probs: Float[Array, "K V"],
    taken: Float[Array, "V"],
    length: Int[Array, ""],
    rules: Rules,
) -> tuple[Int[Array, "K"], tuple]:
    """The tokens that one group's beams take, and (tokens, totals, ended, open, parents) after that.

    Of all K·V candidates those among the best K that end are finished; the best K that do not end go on.
    """
    beams, vocab = log_probs.shape
    candidates = totals[:, None] + log_probs
    ranks = candidates - rules.diversity_penalty * taken
    stops = (jnp.arange(vocab)[:, None] == rules.stop_tokens).any(-1)

    def best(ranks: Array) -> tuple[Array, Array, Array]:
        """The K best: their beam, token and total."""
        found, index = lax.top_k(ranks.ravel(), beams)
        total = jnp.where(jnp.isfinite(found), candidates.ravel()[index], -jnp.inf)
        return index // vocab, index % vocab, total

    parent, token, total = best(ranks)
    ends = stops[token] | (length == rules.budget)
    scores = jnp.where(ends & is_open, total / length.astype(jnp.float32) ** rules.length_penalty, -jnp.inf)
    found = Ended(tokens[parent].at[:, length - 1].set(token), scores, jnp.full(beams, length))
    merged = Ended(*(jnp.concatenate(pair) for pair in zip(ended, found, strict=True)))
    kept = lax.top_k(merged.scores, beams)[1]
    ended = Ended(*(leaf[kept] for leaf in merged))

    parent, token, totals = best(jnp.where(stops, -jnp.inf, ranks))
    is_open &= _may_improve(totals[0], ended, length, rules)
    return token, (tokens[parent].at[:, length - 1].set(token), totals, ended, is_open, parent)


def _may_improve(total: Float[Array, ""], ended: Ended, length: Int[Array, ""], rules: Rules) -> Bool[Array, ""]:
    """Whether the search goes on, whose best unfinished beam has this total."""
    full = jnp.isfinite(ended.scores).all()
    never = rules.early_stopping == EARLY.index("never")
    longest = jnp.where(never & (rules.length_penalty > 0), rules.budget, length).astype(jnp.float32)
    possible = jnp.isfinite(total) & (~full | (total / longest**rules.length_penalty > ended.scores.min()))
    return possible & ~(full & (rules.early_stopping == EARLY.index(True)))
