"""Causal attention for a CPU: blocks of queries that skip future keys, with their own gradient.

XLA's CPU backend runs a batched product on one core, and plain attention computes and masks every future score. Here
the batch is cut into one part a core, which run side by side, and each block of queries meets only the keys up to its
end. The gradient computes the probabilities again from the saved log-sum-exp (Dao et al. 2022, algorithm 4), so that
memory grows with T·H, not T². Forward and gradient of one layer (B 16, T 256, N 4, H 64, two cores): plain 58 ms,
this 31 ms; keeping the probabilities 30 ms; scores laid out transposed 61 ms; blocks of 128 queries 34 ms.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Queries a block. A sequence no longer than this is not worth cutting.
BLOCK = 64
# Beyond this many, parts no longer help and each is compiled.
MAX_PARTS = 8

Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B T K H"]


@jax.custom_vjp
def attend_blocked(q: Queries, k: Keys, v: Keys) -> Queries:
    """softmax(q·kᵀ/sqrt(H))·v, each query seeing keys up to its own position."""
    return _forward(q, k, v)[0]


def _forward(q: Queries, k: Keys, v: Keys) -> tuple[Queries, tuple]:
    out, sums = _in_parts(_forward_part, q, k, v)
    return out, (q, k, v, out, sums)


def _backward(saved: tuple, d_out: Queries) -> tuple[Queries, Keys, Keys]:
    return _in_parts(_backward_part, *saved, d_out)


attend_blocked.defvjp(_forward, _backward)


def _in_parts(function: Callable[..., tuple], *arrays: Array) -> tuple[Array, ...]:
    """`function` on equal parts of the batch, results joined; XLA runs independent parts on different cores."""
    batch = arrays[0].shape[0]
    parts = max(n for n in range(1, min(os.cpu_count() or 1, MAX_PARTS, batch) + 1) if batch % n == 0)
    pieces = zip(*(jnp.split(array, parts) for array in arrays), strict=True)
    return tuple(jnp.concatenate(results) for results in zip(*(function(*p) for p in pieces), strict=True))


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _by_head(x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K G T H"]:
    b, t, n, h = x.shape
    return x.reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)


def _by_token(x: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    b, k, g, t, h = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(b, t, k * g, h)


def _rows(x: Float[Array, "B K G T *"], start: int, stop: int) -> Float[Array, "B K GT *"]:
    """Queries `start` to `stop` of every query head of a key head, one below the other."""
    block = x[:, :, :, start:stop]
    return block.reshape(*x.shape[:2], -1, *x.shape[4:])


def _scores(q: Array, k: Array, start: int, stop: int) -> Float[Array, "B K GT S"]:
    """float32 scores of queries `start` to `stop` against keys up to `stop`, the future at -inf."""
    scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)
    seen = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
    return jnp.where(jnp.tile(seen, (q.shape[2] // (stop - start), 1)), scores, -jnp.inf)


def _forward_part(q: Queries, k: Keys, v: Keys) -> tuple[Queries, Float[Array, "B K G T"]]:
    heads, scale = k.shape[2], q.shape[3] ** -0.5
    q, k, v = _by_head(q * scale, heads), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    outs, sums = [], []
    for start, stop in _blocks(q.shape[3]):
        scores = _scores(_rows(q, start, stop), k[:, :, :stop], start, stop)
        largest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(-1, keepdims=True)
        out = jnp.einsum("bkts,bksh->bkth", weights.astype(v.dtype), v[:, :, :stop]) / total.astype(v.dtype)
        outs.append(out.reshape(*q.shape[:3], stop - start, -1))
        sums.append((largest + jnp.log(total)).reshape(*q.shape[:3], stop - start))
    return _by_token(jnp.concatenate(outs, 3)), jnp.concatenate(sums, 3)


def _backward_part(
    q: Queries, k: Keys, v: Keys, out: Queries, sums: Float[Array, "B K G T"], d_out: Queries
) -> tuple[Queries, Keys, Keys]:
    heads, scale = k.shape[2], q.shape[3] ** -0.5
    q, k, v = _by_head(q * scale, heads), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    out, d_out = _by_head(out, heads), _by_head(d_out, heads)
    through = (d_out.astype(jnp.float32) * out).sum(-1)  # Σ_s p·dp, without the scores
    d_q, d_k, d_v = [], k[:, :, :0], v[:, :, :0]
    for start, stop in reversed(_blocks(q.shape[3])):  # the last block alone reaches every key
        block = partial(_rows, start=start, stop=stop)
        keys, values = k[:, :, :stop], v[:, :, :stop]
        weights = jnp.exp(_scores(block(q), keys, start, stop) - block(sums)[..., None])
        d_weights = jnp.einsum("bkth,bksh->bkts", block(d_out), values, preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - block(through)[..., None])).astype(k.dtype)
        d_q.append(jnp.einsum("bkts,bksh->bkth", d_scores, keys).reshape(*q.shape[:3], stop - start, -1))
        d_k = _add_to_first(d_k, jnp.einsum("bkts,bkth->bksh", d_scores, block(q)))
        d_v = _add_to_first(d_v, jnp.einsum("bkts,bkth->bksh", weights.astype(v.dtype), block(d_out)))
    return _by_token(jnp.concatenate(d_q[::-1], 3)) * scale, d_k.transpose(0, 2, 1, 3), d_v.transpose(0, 2, 1, 3)


def _add_to_first(total: Float[Array, "B K S H"], part: Float[Array, "B K P H"]) -> Float[Array, "B K S H"]:
    """`part` added to the first P keys of `total`; an update in place would copy all of it each time."""
    count = part.shape[2]
    return jnp.concatenate([total[:, :, :count] + part, total[:, :, count:]], 2) if total.shape[2] else part
