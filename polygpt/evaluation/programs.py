"""The compiled functions behind scoring: hidden states of all positions, logits of the positions that are scored."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from polygpt.model import Decoder, ModelConfig, Params, model_of

# Positions whose logits, float32 [LOGIT_ROWS, V], are computed at a time.
# On a CPU 64 were a tenth slower and 256 no faster.
LOGIT_ROWS = 128


class Picks(NamedTuple):
    """The positions to score: `index[i]`, among a batch's hidden states, predicts `target[i]`, for i < count."""

    index: Int[Array, " M"]
    target: Int[Array, " M"]
    count: Int[Array, ""]


class Programs(NamedTuple):
    """What is compiled; `plain` and `endings` give (ln p of each target, whether none is likelier), [M] each.

    plain(params, tokens [B, T], picks): picks index the hidden states [B·T].
    contexts(params, tokens [Q, T], lengths [Q], room): the last hidden states [Q, D] and the decoding states after
        them, which have room for so many tokens in all.
    endings(params, last, state, owner [N], lengths [N], tokens [N, U], counts [N], picks): rows that go on after
        context `owner` of that many tokens; picks index `last`, then the rows' hidden states [N·U].
    """

    plain: jax.stages.Wrapped
    contexts: jax.stages.Wrapped
    endings: jax.stages.Wrapped


@lru_cache(maxsize=16)
def programs_of(config: ModelConfig) -> Programs:
    """The functions of one configuration, compiled once for each shape however many models have it."""
    model = model_of(config)

    @jax.jit
    def plain(params: Params, tokens: Array, picks: Picks) -> tuple[Array, Array]:
        decoder = model.module(params)
        hidden = decoder(tokens).hidden
        return _judge(decoder, hidden.reshape(-1, hidden.shape[-1]), picks)

    def contexts(params: Params, tokens: Array, lengths: Array, room: int) -> tuple[Array, PyTree]:
        output = model.hidden(
            params,
            tokens,
            state=model.init_state(len(tokens), room),
            valid=jnp.arange(tokens.shape[1]) < lengths[:, None],
            fresh=True,
        )
        last = jnp.take_along_axis(output.hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return last, output.state

    @jax.jit
    def endings(
        params: Params,
        last: Array,
        state: PyTree,
        owner: Array,
        lengths: Array,
        tokens: Array,
        counts: Array,
        picks: Picks,
    ) -> tuple[Array, Array]:
        decoder = model.module(params)
        own = jax.tree.map(lambda leaf: _of_owners(leaf, owner), state)
        steps = jnp.arange(tokens.shape[1])
        output = decoder(tokens, positions=lengths[:, None] + steps, state=own, valid=steps < counts[:, None])
        hidden = jnp.concatenate([last, output.hidden.reshape(-1, last.shape[-1])])
        return _judge(decoder, hidden, picks)

    return Programs(plain, jax.jit(contexts, static_argnums=3), endings)


def _of_owners(leaf: Shaped[Array, "layers Q ..."], owner: Int[Array, " N"]) -> Shaped[Array, "layers N ..."]:
    """`leaf[:, owner]`, for which XLA would transpose the whole leaf twice (29 MB: 9.9 ms; like this 3.7 ms)."""
    layers, count, *rest = leaf.shape
    return leaf.reshape(layers * count, *rest)[jnp.arange(layers)[:, None] * count + owner]


def _judge(decoder: Decoder, hidden: Float[Array, "P D"], picks: Picks) -> tuple[Float[Array, " M"], Bool[Array, " M"]]:
    """`LOGIT_ROWS` positions at a time: [P, V] would not fit where there are many, and most are not asked for."""

    def some(number: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        at = number * LOGIT_ROWS
        index, target = (lax.dynamic_slice_in_dim(part, at, LOGIT_ROWS) for part in picks[:2])
        logits = decoder.logits(hidden[index])
        chosen = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        # Not argmax: 0.94 s of CPU time for 1,024 positions at V = 49,152, where the largest logit takes 0.75.
        likeliest = logits.max(axis=1)
        log_p = chosen - likeliest - jnp.log(jnp.exp(logits - likeliest[:, None]).sum(axis=1))
        asked = at + jnp.arange(LOGIT_ROWS) < picks.count
        judged = jnp.where(asked, log_p, 0), asked & (chosen >= likeliest)
        return tuple(
            lax.dynamic_update_slice_in_dim(whole, part, at, 0) for whole, part in zip(found, judged, strict=True)
        )

    empty = jnp.zeros(picks.index.shape, jnp.float32), jnp.zeros(picks.index.shape, bool)
    return lax.fori_loop(0, -(-picks.count // LOGIT_ROWS), some, empty)
