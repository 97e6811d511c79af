"""One tile of attention: a block of queries against the keys within its reach, forward and backward.

Knows nothing of how a sequence is cut into tiles; `blocked.py` does that.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from polygpt.model.attention.scores import ScoreInputs, ScoreRule, visible

Rows = Float[Array, "B K G T H"]  # queries by key head and the group that it serves
Columns = Float[Array, "B K S H"]


class Tile(NamedTuple):
    """Where a block lies: the positions of its queries and of the keys within their reach (negative: none)."""

    queries: Int[Array, " T"]
    keys: Int[Array, " S"]
    query_segments: Int[Array, "B T"] | None
    key_segments: Int[Array, "B S"] | None
    key: PRNGKeyArray | None


def _scores(
    q: Rows, k: Columns, rule: ScoreRule, slopes: Float[Array, "K G"] | None, block: Tile
) -> tuple[Float[Array, "B K G T S"], Float[Array, "B K G T S"] | None]:
    """float32 scores with what is not seen at -inf; and the slope of the soft cap at each, where there is one.

    `q` is scaled already.
    """
    b, heads, g, t, h = q.shape
    raw = jnp.einsum("bkth,bksh->bkts", q.reshape(b, heads, g * t, h), k, preferred_element_type=jnp.float32)
    scores = rule.cap(raw).reshape(b, heads, g, t, -1)
    slope = None if rule.softcap is None else 1 - jnp.square(scores / rule.softcap)
    if slopes is not None:
        distance = block.queries[:, None] - block.keys[None, :]
        scores = scores - slopes[None, :, :, None, None] * distance
    seen: Bool[Array, "#B T S"] = visible(block.queries, block.keys, rule.window)[None]
    if block.query_segments is not None:
        seen = seen & (block.query_segments[:, :, None] == block.key_segments[:, None, :])
    return jnp.where(seen[:, None, None], scores, -jnp.inf), slope


def _kept(shape: tuple[int, ...], rule: ScoreRule, key: PRNGKeyArray | None) -> Array | None:
    """The factor that dropout puts on each probability; None where nothing is dropped."""
    if key is None or rule.dropout == 0:
        return None
    return jax.random.bernoulli(key, 1 - rule.dropout, shape) / (1 - rule.dropout)


def tile_forward(
    q: Rows, k: Columns, v: Columns, rule: ScoreRule, heads: ScoreInputs, block: Tile
) -> tuple[Rows, Float[Array, "B K G T"]]:
    """The outputs of a block's queries and the logarithm of each softmax's denominator."""
    scores, _ = _scores(q, k, rule, heads.slopes, block)
    largest = scores.max(-1, keepdims=True)
    if heads.sinks is not None:
        sink = heads.sinks[None, :, :, None, None]
        largest = jnp.maximum(largest, sink)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    if heads.sinks is not None:
        total = total + jnp.exp(sink - largest)
    kept = _kept(weights.shape, rule, block.key)
    weights = weights if kept is None else weights * kept
    b, kv, g, t, _ = q.shape
    rows = weights.astype(v.dtype).reshape(b, kv, g * t, -1)
    out = jnp.einsum("bkts,bksh->bkth", rows, v, preferred_element_type=jnp.float32).reshape(q.shape) / total
    return out.astype(q.dtype), (largest + jnp.log(total))[..., 0]


def tile_backward(
    saved: tuple[Rows, Float[Array, "B K G T"], Float[Array, "B K G T"], Rows],
    k: Columns,
    v: Columns,
    rule: ScoreRule,
    heads: ScoreInputs,
    block: Tile,
) -> tuple[Rows, Columns, Columns]:
    """Gradients of a block's scaled queries, and what it adds to those of its keys and values."""
    q, sums, through, d_out = saved
    b, kv, g, t, _ = q.shape

    def rows(x: Array) -> Array:
        return x.reshape(b, kv, g * t, -1)

    scores, slope = _scores(q, k, rule, heads.slopes, block)
    weights = jnp.exp(scores - sums[..., None])
    d_weights = jnp.einsum("bkth,bksh->bkts", rows(d_out), v, preferred_element_type=jnp.float32)
    d_weights = d_weights.reshape(weights.shape)
    kept = _kept(weights.shape, rule, block.key)
    given = weights if kept is None else weights * kept
    d_scores = given * d_weights - weights * through[..., None]
    d_scores = rows(d_scores if slope is None else d_scores * slope).astype(k.dtype)
    d_q = jnp.einsum("bkts,bksh->bkth", d_scores, k).reshape(q.shape)
    d_k = jnp.einsum("bkts,bkth->bksh", d_scores, rows(q))
    d_v = jnp.einsum("bkts,bkth->bksh", rows(given).astype(v.dtype), rows(d_out))
    return d_q, d_k, d_v
