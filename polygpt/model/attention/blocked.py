"""Causal attention in blocks of queries that meet only keys they may see, with its own gradient.

XLA's CPU backend runs a batched product on one core, and plain attention computes and masks every future score. Here
the work is cut into one part a core, which run side by side, and each block of queries meets only the keys of its
reach: up to its end, or within the window. The gradient computes the probabilities again from the saved log-sum-exp
(Dao et al. 2022, algorithm 4), so that memory grows with T·H, not T². Forward and gradient of one layer (B 16, T 256,
N 4, H 64, two cores): plain 58 ms, this 31 ms; keeping the probabilities 30 ms; scores laid out transposed 61 ms;
blocks of 128 queries 34 ms.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from polygpt.model.attention.scores import ScoreInputs, ScoreRule
from polygpt.model.attention.tiles import Columns, Rows, Tile, tile_backward, tile_forward

# Queries a block. A sequence no longer than this is not worth cutting.
BLOCK = 64
# Spans a sequence without a window is cut into at most: each is compiled by itself, since their keys differ in number.
# A span of more than one block is a loop over blocks, which meet some keys in vain: an eighth more work. With 16 spans
# a step of two layers at T 1024 compiled in 11 s, with 8 in 6; one layer ran in the same 120 ms.
MAX_BLOCKS = 8
# Blocks with a window are as long as the window, up to so many times BLOCK.
MAX_WINDOW_BLOCKS = 4
# Beyond this many, parts no longer help and each is compiled.
MAX_PARTS = 8

Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B T K H"]
Index = int | Int[Array, ""]
Run = Callable[..., tuple]  # a tile's work: (tile, rows, keys, values) -> results


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend_blocked(q: Queries, k: Keys, v: Keys, rule: ScoreRule, inputs: ScoreInputs) -> Queries:
    """softmax(scores)·v, each query seeing keys up to its own position, as `rule` and `inputs` say."""
    return _forward(q, k, v, rule, inputs)[0]


def _forward(q: Queries, k: Keys, v: Keys, rule: ScoreRule, inputs: ScoreInputs) -> tuple[Queries, tuple]:
    out, sums = _in_parts(partial(_forward_part, rule), inputs, q, k, v)
    return out, (q, k, v, inputs, out, sums)


def _backward(rule: ScoreRule, saved: tuple, d_out: Queries) -> tuple[Queries, Keys, Keys, ScoreInputs]:
    q, k, v, inputs, out, sums = saved
    through = (d_out.astype(jnp.float32) * out).sum(-1)  # Σ_s p·dp of each row, without the scores
    d_q, d_k, d_v = _in_parts(partial(_backward_part, rule), inputs, q, k, v, sums, through, d_out)
    d_sinks = None if inputs.sinks is None else -(jnp.exp(inputs.sinks - sums) * through).sum((0, 1))
    d_slopes = None if inputs.slopes is None else jnp.zeros_like(inputs.slopes)  # ALiBi's are not learned
    return d_q, d_k, d_v, ScoreInputs(sinks=d_sinks, slopes=d_slopes)


attend_blocked.defvjp(_forward, _backward)


def _in_parts(function: Callable[..., tuple], inputs: ScoreInputs, *arrays: Array) -> tuple[Array, ...]:
    """`function` on equal parts of the batch, or else of the heads, joined; XLA runs them on different cores."""
    cores = min(os.cpu_count() or 1, MAX_PARTS) if jax.default_backend() == "cpu" else 1
    batch, heads = arrays[1].shape[0], arrays[1].shape[2]
    by_batch, by_head = (max(n for n in range(1, min(cores, size) + 1) if size % n == 0) for size in (batch, heads))
    axis, parts = (0, by_batch) if by_batch >= by_head else (2, by_head)
    pieces = zip(*(jnp.split(array, parts, axis) for array in arrays), strict=True)
    results = [function(_part(inputs, axis, i, parts), *piece) for i, piece in enumerate(pieces)]
    return tuple(jnp.concatenate(result, axis) for result in zip(*results, strict=True))


def _part(inputs: ScoreInputs, axis: int, index: int, parts: int) -> ScoreInputs:
    """What part `index` needs of the inputs: its rows of the batch (axis 0), or its heads (axis 2)."""

    def cut(array: Array | None, where: int) -> Array | None:
        return array if array is None or axis != where else jnp.split(array, parts)[index]

    return ScoreInputs(
        sinks=cut(inputs.sinks, 2),
        slopes=cut(inputs.slopes, 2),
        segment_ids=cut(inputs.segment_ids, 0),
        key=None if inputs.key is None else jax.random.fold_in(inputs.key, index),
    )


def _by_head(x: Float[Array, "B T N *H"], kv_heads: int) -> Float[Array, "B K G T *H"]:
    grouped = x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:])
    return jnp.moveaxis(grouped, 1, 3)


def _by_token(x: Float[Array, "B K G T *H"]) -> Float[Array, "B T N *H"]:
    moved = jnp.moveaxis(x, 3, 1)
    return moved.reshape(*moved.shape[:2], -1, *moved.shape[4:])


def _grouped(inputs: ScoreInputs, kv_heads: int) -> ScoreInputs:
    """Sinks and slopes as [K, G]."""
    by_group = (None if x is None else x.reshape(kv_heads, -1) for x in (inputs.sinks, inputs.slopes))
    return ScoreInputs(*by_group, inputs.segment_ids, inputs.key)


def _forward_part(
    rule: ScoreRule, inputs: ScoreInputs, q: Queries, k: Keys, v: Keys
) -> tuple[Queries, Float[Array, "B T N"]]:
    heads = _grouped(inputs, k.shape[2])
    plan = _windowed if rule.window is not None and rule.window < q.shape[1] else _growing
    q = _by_head(rule.scaled(q), k.shape[2])
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    out, sums = plan(
        lambda block, rows, keys, values: tile_forward(*rows, keys, values, rule, heads, block),
        rule,
        heads,
        (q,),
        k,
        v,
    )
    return _by_token(out), _by_token(sums)


def _backward_part(
    rule: ScoreRule,
    inputs: ScoreInputs,
    q: Queries,
    k: Keys,
    v: Keys,
    sums: Float[Array, "B T N"],
    through: Float[Array, "B T N"],
    d_out: Queries,
) -> tuple[Queries, Keys, Keys]:
    kv_heads = k.shape[2]
    heads = _grouped(inputs, kv_heads)
    rows = tuple(_by_head(x, kv_heads) for x in (rule.scaled(q), sums, through, d_out))
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    plan = _windowed_gradient if rule.window is not None and rule.window < q.shape[1] else _growing_gradient
    d_q, d_k, d_v = plan(
        lambda block, rows, keys, values: tile_backward(rows, keys, values, rule, heads, block),
        rule,
        heads,
        rows,
        k,
        v,
    )
    return rule.scaled(_by_token(d_q)), d_k.transpose(0, 2, 1, 3), d_v.transpose(0, 2, 1, 3)


def _span(inputs: ScoreInputs, start: Index, queries: int, stop: Index, keys: int) -> Tile:
    """The block of `queries` queries from `start` on with the last `keys` keys up to `stop`."""
    segments = None, None
    if inputs.segment_ids is not None:
        cuts = ((start, queries), (stop - keys, keys))
        segments = tuple(lax.dynamic_slice_in_dim(inputs.segment_ids, first, count, 1) for first, count in cuts)
    key = None if inputs.key is None else jax.random.fold_in(inputs.key, start)
    return Tile(start + jnp.arange(queries), stop - keys + jnp.arange(keys), *segments, key)


def _spans(length: int) -> list[tuple[int, int]]:
    """Cuts of a sequence at multiples of BLOCK, at most MAX_BLOCKS and a rest."""
    whole = length - length % BLOCK
    size = -(-whole // (BLOCK * MAX_BLOCKS)) * BLOCK
    spans = [(start, min(start + size, whole)) for start in range(0, whole, size)] if whole else []
    return [*spans, (whole, length)] if whole < length else spans


def _growing(run: Run, rule: ScoreRule, inputs: ScoreInputs, rows: tuple, k: Columns, v: Columns) -> tuple:
    """Spans that see all keys up to their end: each more than the one before."""
    results = []
    for start, stop in _spans(k.shape[2]):

        def one(_: None, first: Int[Array, ""], start: int = start, stop: int = stop) -> tuple[None, tuple]:
            block = _span(inputs, first, min(BLOCK, stop - start), stop, stop)
            return None, run(block, _cut(rows, first, block.queries.size), k[:, :, :stop], v[:, :, :stop])

        _, blocks = lax.scan(one, None, jnp.arange(start, stop, BLOCK), unroll=stop - start <= BLOCK)
        results.append(tuple(_joined(x, stop - start) for x in blocks))
    return tuple(jnp.concatenate(result, 3) for result in zip(*results, strict=True))


def _growing_gradient(run: Run, rule: ScoreRule, inputs: ScoreInputs, rows: tuple, k: Columns, v: Columns) -> tuple:
    d_q, d_k, d_v = [], k[:, :, :0], v[:, :, :0]
    for start, stop in reversed(_spans(k.shape[2])):  # the last span alone reaches every key

        def one(
            totals: tuple, first: Int[Array, ""], start: int = start, stop: int = stop
        ) -> tuple[tuple[Columns, Columns], Rows]:
            block = _span(inputs, first, min(BLOCK, stop - start), stop, stop)
            block_q, *parts = run(block, _cut(rows, first, block.queries.size), k[:, :, :stop], v[:, :, :stop])
            return tuple(total + part for total, part in zip(totals, parts, strict=True)), block_q

        empty = jnp.zeros_like(k[:, :, :stop]), jnp.zeros_like(v[:, :, :stop])
        (span_k, span_v), blocks = lax.scan(one, empty, jnp.arange(start, stop, BLOCK), unroll=stop - start <= BLOCK)
        d_q.append(_joined(blocks, stop - start))
        d_k, d_v = _add_to_first(d_k, span_k), _add_to_first(d_v, span_v)
    return jnp.concatenate(d_q[::-1], 3), d_k, d_v


def _cut(rows: tuple, start: Int[Array, ""], count: int) -> tuple:
    return tuple(lax.dynamic_slice_in_dim(x, start, count, 3) for x in rows)


def _add_to_first(total: Float[Array, "B K S H"], part: Float[Array, "B K P H"]) -> Float[Array, "B K _ H"]:
    """`part` added to the first P keys of `total`; an update in place would copy all of it each time."""
    count = part.shape[2]
    return jnp.concatenate([total[:, :, :count] + part, total[:, :, count:]], 2) if total.shape[2] else part


class _Windows(NamedTuple):
    """A sequence padded so that every block has the same number of queries and keys, for one compiled loop."""

    size: int
    count: int
    reach: int  # keys before a block that its first query sees
    inputs: ScoreInputs
    rows: tuple
    k: Columns
    v: Columns

    @classmethod
    def of(cls, rule: ScoreRule, inputs: ScoreInputs, rows: tuple, k: Columns, v: Columns) -> _Windows:
        length, reach = k.shape[2], rule.window - 1
        size = min(max(-(-rule.window // BLOCK), 1), MAX_WINDOW_BLOCKS) * BLOCK
        count = -(-length // size)
        after = count * size - length

        def pad(x: Array, axis: int, before: int, value: int = 0) -> Array:
            widths = [(before, after) if i == axis else (0, 0) for i in range(x.ndim)]
            return jnp.pad(x, widths, constant_values=value)

        if inputs.segment_ids is not None:
            inputs = inputs._replace(segment_ids=pad(inputs.segment_ids, 1, reach, -1))
        rows = tuple(pad(x, 3, 0) for x in rows)
        return cls(size, count, reach, inputs, rows, pad(k, 2, reach), pad(v, 2, reach))

    def block(self, index: Int[Array, ""]) -> tuple[Tile, tuple, Columns, Columns]:
        """Block `index`: where it lies, its rows, and the keys and values of its reach."""
        start, keys = index * self.size, self.size + self.reach
        # In the padded arrays of keys and segments, positions are `reach` further on.
        block = _span(self.inputs, start + self.reach, self.size, start + keys, keys)
        block = block._replace(queries=block.queries - self.reach, keys=block.keys - self.reach)
        rows = tuple(lax.dynamic_slice_in_dim(x, start, self.size, 3) for x in self.rows)
        k, v = (lax.dynamic_slice_in_dim(x, start, keys, 2) for x in (self.k, self.v))
        return block, rows, k, v


def _windowed(run: Run, rule: ScoreRule, inputs: ScoreInputs, rows: tuple, k: Columns, v: Columns) -> tuple:
    """Blocks that see a window: all alike, in one loop."""
    windows = _Windows.of(rule, inputs, rows, k, v)
    _, results = lax.scan(lambda _, i: (None, run(*windows.block(i))), None, jnp.arange(windows.count))
    return tuple(_joined(x, k.shape[2]) for x in results)


def _windowed_gradient(run: Run, rule: ScoreRule, inputs: ScoreInputs, rows: tuple, k: Columns, v: Columns) -> tuple:
    windows = _Windows.of(rule, inputs, rows, k, v)

    def one(totals: tuple[Columns, Columns], index: Int[Array, ""]) -> tuple[tuple[Columns, Columns], Rows]:
        d_q, *parts = run(*windows.block(index))
        start, keys = index * windows.size, windows.size + windows.reach
        added = (
            lax.dynamic_update_slice_in_dim(total, lax.dynamic_slice_in_dim(total, start, keys, 2) + part, start, 2)
            for total, part in zip(totals, parts, strict=True)
        )
        return tuple(added), d_q

    empty = jnp.zeros_like(windows.k), jnp.zeros_like(windows.v)
    totals, d_q = lax.scan(one, empty, jnp.arange(windows.count))
    own = slice(windows.reach, windows.reach + k.shape[2])
    return _joined(d_q, k.shape[2]), totals[0][:, :, own], totals[1][:, :, own]


def _joined(blocks: Float[Array, "count B K G block *H"], length: int) -> Float[Array, "B K G T *H"]:
    """Stacked blocks as one sequence of `length`."""
    moved = jnp.moveaxis(blocks, 0, 3)
    return moved.reshape(*moved.shape[:3], -1, *moved.shape[5:])[:, :, :, :length]
