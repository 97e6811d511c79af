"""One tile of attention: a block of queries against the keys that it may see, forward and backward.

Knows nothing of how a sequence is cut into tiles; `blocked.py` does that. FlashAttention's notation is used: L for the
log-sum-exp of a row's scores, delta for the row sums of d_out ∘ out (Dao et al. 2022, algorithm 4).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from polygpt.kernels.scores import ScoreInputs, ScoreRule, visible

Rows = Float[Array, "B K G T H"]  # queries by key head and the group that it serves
Columns = Float[Array, "B K S H"]


class Tile(NamedTuple):
    """The positions of a block's queries and of the keys that they may see (negative: no key)."""

    queries: Int[Array, " T"]
    keys: Int[Array, " S"]
    query_segments: Int[Array, "B T"] | None
    key_segments: Int[Array, "B S"] | None
    key: PRNGKeyArray | None


def _scores(
    q: Rows, k: Columns, rule: ScoreRule, slopes: Float[Array, "K G"] | None, block: Tile
) -> tuple[Float[Array, "B K G T S"], Float[Array, "B K G T S"] | None]:
    """float32 scores, -inf where a key is not seen; and the derivative of the soft cap at each, if there is one.

    `q` is already scaled.
    """
    b, heads, g, t, h = q.shape
    raw = jnp.einsum("bkth,bksh->bkts", q.reshape(b, heads, g * t, h), k, preferred_element_type=jnp.float32)
    scores = rule.cap(raw).reshape(b, heads, g, t, -1)
    cap_slope = None if rule.softcap is None else 1 - jnp.square(scores / rule.softcap)
    if slopes is not None:
        distance = block.queries[:, None] - block.keys[None, :]
        scores = scores - slopes[None, :, :, None, None] * distance
    seen: Bool[Array, "#B T S"] = visible(block.queries, block.keys, rule.window)[None]
    if block.query_segments is not None:
        seen = seen & (block.query_segments[:, :, None] == block.key_segments[:, None, :])
    return jnp.where(seen[:, None, None], scores, -jnp.inf), cap_slope


def _kept(shape: tuple[int, ...], rule: ScoreRule, key: PRNGKeyArray | None) -> Array | None:
    """The factor by which dropout multiplies each probability; None if nothing is dropped."""
    if key is None or rule.dropout == 0:
        return None
    return jax.random.bernoulli(key, 1 - rule.dropout, shape) / (1 - rule.dropout)


def tile_forward(
    q: Rows, k: Columns, v: Columns, rule: ScoreRule, heads: ScoreInputs, block: Tile
) -> tuple[Rows, Float[Array, "B K G T"]]:
    """The outputs of a block's queries and the log-sum-exp of each row of scores."""
    scores, _ = _scores(q, k, rule, heads.slopes, block)
    maximum = scores.max(-1, keepdims=True)
    if heads.sinks is not None:
        sink = heads.sinks[None, :, :, None, None]
        maximum = jnp.maximum(maximum, sink)
    weights = jnp.exp(scores - maximum)
    denominator = weights.sum(-1, keepdims=True)
    if heads.sinks is not None:
        denominator = denominator + jnp.exp(sink - maximum)
    kept = _kept(weights.shape, rule, block.key)
    weights = weights if kept is None else weights * kept
    b, kv, g, t, _ = q.shape
    rows = weights.astype(v.dtype).reshape(b, kv, g * t, -1)
    out = jnp.einsum("bkts,bksh->bkth", rows, v, preferred_element_type=jnp.float32).reshape(q.shape) / denominator
    return out.astype(q.dtype), (maximum + jnp.log(denominator))[..., 0]


def tile_backward(
    saved: tuple[Rows, Float[Array, "B K G T"], Float[Array, "B K G T"], Rows],
    k: Columns,
    v: Columns,
    rule: ScoreRule,
    heads: ScoreInputs,
    block: Tile,
) -> tuple[Rows, Columns, Columns]:
    """The gradient of a block's scaled queries, and its share of the gradients of the keys and values.

    `saved`: scaled queries, log-sum-exp, delta and the gradient of the outputs.
    """
    q, log_sum_exp, delta, d_out = saved
    b, kv, g, t, _ = q.shape

    def rows(x: Array) -> Array:
        return x.reshape(b, kv, g * t, -1)

    scores, cap_slope = _scores(q, k, rule, heads.slopes, block)
    weights = jnp.exp(scores - log_sum_exp[..., None])
    d_weights = jnp.einsum("bkth,bksh->bkts", rows(d_out), v, preferred_element_type=jnp.float32)
    d_weights = d_weights.reshape(weights.shape)
    kept = _kept(weights.shape, rule, block.key)
    dropped = weights if kept is None else weights * kept
    d_scores = dropped * d_weights - weights * delta[..., None]
    d_scores = rows(d_scores if cap_slope is None else d_scores * cap_slope).astype(k.dtype)
    d_q = jnp.einsum("bkts,bksh->bkth", d_scores, k).reshape(q.shape)
    d_k = jnp.einsum("bkts,bkth->bksh", d_scores, rows(q))
    d_v = jnp.einsum("bkts,bkth->bksh", rows(dropped).astype(v.dtype), rows(d_out))
    return d_q, d_k, d_v
