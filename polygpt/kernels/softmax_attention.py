"""Causal attention: the equation, which is the reference, and the choice of a faster kernel that computes the same.

Knows shapes, masks and score rules, nothing of projections, rotations or decoding states.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from polygpt.errors import RequestError
from polygpt.kernels.blocked import BLOCK, blocked_attention
from polygpt.kernels.head_shards import sharded_over_heads
from polygpt.kernels.pallas import pallas_attention
from polygpt.kernels.regularization import dropout
from polygpt.kernels.scores import ScoreInputs, ScoreRule, masked_scores, visible

Implementation = Literal["auto", "xla", "cudnn", "pallas"]
Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B S K H"]

# From this length on the [T, T] scores no longer fit; on a CPU blocks are faster from BLOCK on.
LONG = 4096
_HOME = {"cudnn": ("gpu", "an NVIDIA GPU"), "pallas": ("tpu", "a TPU")}
_ODD_HEAD = "head_dim other than 8, 16, 24, ..., 128"
# What the fused kernels do not compute beside plain causal attention, or (cuDNN's window, jax pull request 39576) have
# been seen to compute wrongly.
_UNSUPPORTED = {
    "cudnn": {"window", "softcap", "sinks", "alibi", "dropout", "segment ids", _ODD_HEAD},
    "pallas": {"alibi", "dropout"},
}


class AttentionSpec(NamedTuple):
    """What is asked of an attention kernel, known before there are arrays.

    Attributes:
        dtype: of queries, keys and values.
        length: T.
        head_dim: H.
        extras: what is asked for beside causality: some of `window`, `softcap`, `sinks`, `alibi`, `dropout`,
            `segment ids`.
    """

    dtype: DTypeLike
    length: int
    head_dim: int
    extras: frozenset[str] = frozenset()

    @classmethod
    def of(cls, rule: ScoreRule, dtype: DTypeLike, length: int, head_dim: int, **extras: bool) -> AttentionSpec:
        """From a rule and what else is present, by name (`sinks`, `alibi`, `segment_ids`, `dropout`)."""
        asked = {
            "window": rule.window is not None and rule.window < length,
            "softcap": rule.softcap is not None,
            "dropout": rule.dropout > 0,
            **{name.replace("_", " "): present for name, present in extras.items()},
        }
        return cls(dtype, length, head_dim, frozenset(name for name, present in asked.items() if present))

    def obstacles(self, implementation: Implementation) -> list[str]:
        """What `implementation` would need changed to compute this, on whatever machine; empty if nothing."""
        found = []
        if implementation == "cudnn" and jnp.dtype(self.dtype).itemsize != 2:
            found.append(f"compute_dtype bfloat16 or float16, not {jnp.dtype(self.dtype).name}")
        # cuDNN has no form for other head sizes on every card that it supports.
        odd = {_ODD_HEAD} if self.head_dim % 8 or self.head_dim > 128 else set()
        lacks = _UNSUPPORTED.get(implementation, set()) & (self.extras | odd)
        return found + [f"no {name}" for name in sorted(lacks)]


def attention(
    q: Queries, k: Keys, v: Keys, rule: ScoreRule, inputs: ScoreInputs, implementation: Implementation = "auto"
) -> Queries:
    """Causal attention of T queries over the same T positions.

    Args:
        q: queries [B, T, N, H].
        k: keys [B, T, K, H], K dividing N.
        v: values, like the keys.
        rule: scale, window, soft cap, dropout.
        inputs: sinks, slopes, segment ids, the key of dropout.
        implementation: see `choose_attention`.
    """

    def own(
        q: Queries, k: Keys, v: Keys, segment_ids: Array | None, heads: tuple, _: None, key: Array | None
    ) -> Queries:
        return _attention(q, k, v, rule, ScoreInputs(*heads, segment_ids, key), implementation)

    heads = inputs.sinks, inputs.slopes
    return sharded_over_heads(own, q, k, v, rows=inputs.segment_ids, heads=heads, key=inputs.key)


def _attention(
    q: Queries, k: Keys, v: Keys, rule: ScoreRule, inputs: ScoreInputs, implementation: Implementation
) -> Queries:
    """`attention` on one device."""
    spec = AttentionSpec.of(
        rule,
        q.dtype,
        q.shape[1],
        q.shape[-1],
        sinks=inputs.sinks is not None,
        alibi=inputs.slopes is not None,
        dropout=rule.dropout > 0 and inputs.key is not None,
        segment_ids=inputs.segment_ids is not None,
    )
    match choose_attention(implementation, spec):
        case "cudnn":
            return jax.nn.dot_product_attention(q, k, v, scale=rule.scale, is_causal=True, implementation="cudnn")
        case "pallas":
            return pallas_attention(q, k, v, rule, inputs)
        case "xla in blocks":
            return blocked_attention(q, k, v, rule, inputs)
    positions = jnp.arange(q.shape[1])[None]
    return reference_attention(q, k, v, rule, inputs, positions, positions)


def choose_attention(implementation: Implementation, spec: AttentionSpec) -> str:
    """Which kernel computes `spec` on this machine: `cudnn`, `pallas`, `xla` or `xla in blocks`.

    `auto` takes the machine's fused kernel where it computes all of `spec`. `xla` is the equation as it stands, or the
    same in blocks wherever there is a window or the sequence is so long that T² of memory hurts.

    Raises:
        RequestError: a kernel was asked for by name and cannot run here.
    """
    backend = jax.default_backend()
    for name, (home, machine) in _HOME.items():
        missing = spec.obstacles(name)
        if implementation == name:
            if backend != home:
                missing.insert(0, f"{machine} (this is a {backend})")
            if missing:
                raise RequestError(
                    f"attention.implementation={name} needs {' and '.join(missing)}; use implementation=auto"
                )
            return name
        if implementation == "auto" and backend == home and not missing:
            return name
    blocks = "window" in spec.extras or spec.length > (BLOCK if backend == "cpu" else LONG)
    return "xla in blocks" if blocks else "xla"


def reference_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    rule: ScoreRule,
    inputs: ScoreInputs,
    query_positions: Int[Array, "#B T"],
    key_positions: Int[Array, "#B S"],
) -> Queries:
    """Attention by its equation, every score materialised, over keys at any positions (negative: no key).

    Scores and softmax are float32. Segment ids are of queries and keys alike, so they need T = S.
    """
    b, t, n, h = q.shape
    dtype = jnp.promote_types(q.dtype, k.dtype)  # a cache may keep more bits
    weights = _weights(q, k, rule, inputs, query_positions, key_positions).astype(dtype)
    weights = dropout(weights, rule.dropout, inputs.key)
    mixed = jnp.einsum("bkgts,bskh->bkgth", weights, v.astype(dtype), preferred_element_type=jnp.float32)
    return jnp.moveaxis(mixed, 3, 1).astype(q.dtype).reshape(b, t, n, h)


def attention_weights(q: Queries, k: Keys, rule: ScoreRule, inputs: ScoreInputs) -> Float[Array, "B N T T"]:
    """The weights of each head over T positions, float32; of a query's weights those of keys it does not see are 0."""
    positions = jnp.arange(q.shape[1])[None]
    weights = _weights(q, k, rule, inputs, positions, positions)
    return weights.reshape(weights.shape[0], -1, *weights.shape[3:])


def _weights(
    q: Queries,
    k: Keys,
    rule: ScoreRule,
    inputs: ScoreInputs,
    query_positions: Int[Array, "#B T"],
    key_positions: Int[Array, "#B S"],
) -> Float[Array, "B K G T S"]:
    """softmax of the scores, float32, G query heads for each key head; a sink's share is left out."""
    b, t, n, h = q.shape
    groups = (k.shape[2], n // k.shape[2])
    dtype = jnp.promote_types(q.dtype, k.dtype)
    grouped, k = q.reshape(b, t, *groups, h).astype(dtype), k.astype(dtype)
    products = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    seen = visible(query_positions, key_positions, rule.window)
    if inputs.segment_ids is not None:
        seen = seen & (inputs.segment_ids[:, :, None] == inputs.segment_ids[:, None, :])
    scores = masked_scores(products, rule, inputs, query_positions, key_positions, seen)
    if inputs.sinks is not None:
        sink = jnp.broadcast_to(inputs.sinks.reshape(groups)[None, :, :, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink], -1)
    return jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]]
