"""Causal attention: the equation, which is the reference, and the choice of a faster way to the same numbers.

Knows shapes, masks and score rules, nothing of projections, rotations or caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from polygpt.errors import RequestError
from polygpt.model.attention.blocked import BLOCK, attend_blocked
from polygpt.model.attention.pallas import attend_pallas
from polygpt.model.attention.scores import ScoreInputs, ScoreRule, visible
from polygpt.model.parts import dropout

Implementation = Literal["auto", "xla", "cudnn", "pallas"]
Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B S K H"]

# What beside plain causal attention the fused kernels do not compute, or (cuDNN's window, jax pull request 39576) have
# been seen to compute wrongly.
ODD_HEAD = "head_dim other than 8, 16, 24, ..., 128"
_FUSED_LACKS = {
    "cudnn": ("window", "softcap", "sinks", "alibi", "dropout", "segment ids", ODD_HEAD),
    "pallas": ("alibi", "dropout"),
}
# On a CPU blocks are faster from BLOCK on; elsewhere they are for what would not fit.
LONG = 4096
_HOME = {"cudnn": ("gpu", "an NVIDIA GPU"), "pallas": ("tpu", "a TPU")}


def attend(
    q: Queries, k: Keys, v: Keys, rule: ScoreRule, inputs: ScoreInputs, implementation: Implementation = "auto"
) -> Queries:
    """Causal attention of T queries over the same T positions.

    Args:
        q: queries [B, T, N, H].
        k: keys [B, T, K, H], K dividing N.
        v: values, like the keys.
        rule: scale, window, soft cap, dropout.
        inputs: sinks, slopes, segment ids, the key of dropout.
        implementation: see `choose`.
    """
    present = {
        "window": rule.window is not None and rule.window < q.shape[1],
        "softcap": rule.softcap is not None,
        "sinks": inputs.sinks is not None,
        "alibi": inputs.slopes is not None,
        "dropout": rule.dropout > 0 and inputs.key is not None,
        "segment ids": inputs.segment_ids is not None,
        ODD_HEAD: is_odd(q.shape[-1]),
    }
    asked = [name for name, wanted in present.items() if wanted]
    match choose(implementation, q.dtype, q.shape[1], asked):
        case "cudnn":
            return jax.nn.dot_product_attention(q, k, v, scale=rule.scale, is_causal=True, implementation="cudnn")
        case "pallas":
            return attend_pallas(q, k, v, rule, inputs)
        case "xla in blocks":
            return attend_blocked(q, k, v, rule, inputs)
    positions = jnp.arange(q.shape[1])[None]
    return attend_positions(q, k, v, rule, inputs, positions, positions)


def choose(implementation: Implementation, dtype: DTypeLike, length: int, asked: Iterable[str] = ()) -> str:
    """What computes causal attention over `length` tokens here: `cudnn`, `pallas`, `xla` or `xla in blocks`.

    `asked` names what is wanted beside causality (`window`, `softcap`, `sinks`, `alibi`, `dropout`, `segment ids`).
    `auto` takes the fused kernel of the machine at hand where it computes all of that. `xla` is the equation as it
    stands, or, wherever there is a window or a sequence so long that T² of memory hurts, the same in blocks.

    Raises:
        RequestError: a kernel was asked for by name and cannot run here.
    """
    backend, asked = jax.default_backend(), tuple(asked)
    for name, (home, machine) in _HOME.items():
        missing = refusals(name, dtype, dict.fromkeys(asked, True))
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
    blocks = "window" in asked or length > (BLOCK if backend == "cpu" else LONG)
    return "xla in blocks" if blocks else "xla"


def is_odd(head_dim: int) -> bool:
    """Whether cuDNN's kernel has no form for this head size on every card that it supports."""
    return head_dim % 8 != 0 or head_dim > 128


def refusals(implementation: Implementation, dtype: DTypeLike, asked: Mapping[str, bool]) -> list[str]:
    """What an implementation would need changed to compute this, on whatever machine; empty if nothing."""
    found = []
    if implementation == "cudnn" and jnp.dtype(dtype).itemsize != 2:
        found.append(f"compute_dtype bfloat16 or float16, not {jnp.dtype(dtype).name}")
    lacks = [name for name in _FUSED_LACKS.get(implementation, ()) if asked.get(name)]
    return found + [f"no {name}" for name in lacks]


def attend_positions(
    q: Queries,
    k: Keys,
    v: Keys,
    rule: ScoreRule,
    inputs: ScoreInputs,
    query_positions: Int[Array, "#B T"],
    key_positions: Int[Array, "#B S"],
) -> Queries:
    """Attention by its equation, every score materialised, over keys at any positions (negative: no key is there).

    Scores and softmax are float32. Segment ids are of queries and keys alike, so they need T = S.
    """
    b, t, n, h = q.shape
    groups = (k.shape[2], n // k.shape[2])
    grouped = q.reshape(b, t, *groups, h)
    dtype = jnp.promote_types(q.dtype, k.dtype)  # a cache may keep more bits
    grouped, k, v = grouped.astype(dtype), k.astype(dtype), v.astype(dtype)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = rule.cap(scores * rule.scale)
    if inputs.slopes is not None:
        distance = query_positions[:, :, None] - key_positions[:, None, :]
        scores = scores - inputs.slopes.reshape(groups)[None, :, :, None, None] * distance[:, None, None]
    seen = visible(query_positions, key_positions, rule.window)
    if inputs.segment_ids is not None:
        seen = seen & (inputs.segment_ids[:, :, None] == inputs.segment_ids[:, None, :])
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    if inputs.sinks is not None:
        sink = jnp.broadcast_to(inputs.sinks.reshape(groups)[None, :, :, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink], -1)
    probabilities = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]].astype(dtype)
    probabilities = dropout(probabilities, rule.dropout, inputs.key)
    mixed = jnp.einsum("bkgts,bskh->bkgth", probabilities, v, preferred_element_type=jnp.float32)
    return jnp.moveaxis(mixed, 3, 1).astype(q.dtype).reshape(b, t, n, h)
