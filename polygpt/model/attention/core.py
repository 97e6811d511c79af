"""softmax(q·kᵀ/sqrt(H))·v: the plain form, which is the reference, and the choice of a faster one.

Knows shapes and masks, nothing of projections, positions or caches.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from polygpt.errors import RequestError
from polygpt.model.attention.blocked import BLOCK, attend_blocked
from polygpt.model.parts import dropout

Implementation = Literal["auto", "xla", "cudnn"]
Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B S K H"]


def attend(
    q: Queries,
    k: Keys,
    v: Keys,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    dropout_rate: float = 0.0,
    key: PRNGKeyArray | None = None,
    implementation: Implementation = "auto",
) -> Queries:
    """Causal attention of T queries over the same T positions.

    Args:
        q: queries [B, T, N, H].
        k: keys [B, T, K, H], K dividing N.
        v: values, like the keys.
        segment_ids: tokens of different segments do not see each other.
        dropout_rate: share of probabilities dropped where `key` is given.
        key: for dropout; None drops nothing.
        implementation: `xla`, `cudnn` (NVIDIA, 16-bit), or `auto`, the fastest that can run.
    """
    simple = segment_ids is None and not (dropout_rate > 0 and key is not None)
    match choose(implementation, q.dtype, q.shape[1], simple):
        case "cudnn":
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        case "blocked":
            return attend_blocked(q, k, v)
    t = q.shape[1]
    mask = jnp.tril(jnp.ones((t, t), bool))[None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return attend_plain(q, k, v, mask, dropout_rate, key)


def choose(
    implementation: Implementation, dtype: jnp.dtype, length: int, simple: bool = True
) -> Literal["cudnn", "blocked", "xla"]:
    """What computes causal attention over `length` tokens; `simple` means no dropout and no segment ids.

    `auto` takes cuDNN's fused kernel where it can run, this project's blocks on a CPU, and otherwise `xla`, the
    equation as it stands.

    Raises:
        RequestError: cuDNN was asked for by name and cannot run here.
    """
    backend = jax.default_backend()
    needs = {
        f"a GPU (this is a {backend})": backend == "gpu",
        "compute_dtype bfloat16 or float16": jnp.dtype(dtype).itemsize == 2,
        "no attention dropout and no segment ids": simple,
    }
    missing = [need for need, met in needs.items() if not met]
    if implementation == "cudnn" and missing:
        raise RequestError(f"attention.implementation=cudnn needs {' and '.join(missing)}; use auto or xla")
    if implementation == "xla":
        return "xla"
    if not missing:
        return "cudnn"
    return "blocked" if backend == "cpu" and simple and length > BLOCK else "xla"


def attend_plain(
    q: Queries,
    k: Keys,
    v: Keys,
    mask: Bool[Array, "#B T S"],
    dropout_rate: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> Queries:
    """Attention by its equation: every score is materialised. Scores and softmax are float32."""
    b, t, n, h = q.shape
    grouped = q.reshape(b, t, k.shape[2], n // k.shape[2], h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * h**-0.5
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    probabilities = dropout(jax.nn.softmax(scores, axis=-1).astype(v.dtype), dropout_rate, key)
    return jnp.einsum("bkgts,bskh->btkgh", probabilities, v).reshape(b, t, n, h)


def attend_cache(q: Queries, k: Keys, v: Keys, positions: Int[Array, "B T"]) -> Queries:
    """Attention of new queries at `positions` over a cache whose slot s holds position s."""
    mask = jnp.arange(k.shape[1])[None, None, :] <= positions[:, :, None]
    return attend_plain(q, k.astype(q.dtype), v.astype(q.dtype), mask)
