"""softmax(q·kᵀ/sqrt(H))·v: the plain form, which is the reference, and the choice of a faster one.

Knows shapes and masks, nothing of projections, positions or caches.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from polygpt.errors import RequestError
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
    dropping = dropout_rate > 0 and key is not None
    if choose(implementation, q.dtype, plain=segment_ids is None and not dropping) == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    t = q.shape[1]
    mask = jnp.tril(jnp.ones((t, t), bool))[None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return attend_plain(q, k, v, mask, dropout_rate, key)


def choose(implementation: Implementation, dtype: jnp.dtype, plain: bool = True) -> Literal["xla", "cudnn"]:
    """The implementation that runs: cuDNN's fused kernel needs a GPU, 16-bit inputs and a plain causal mask.

    Raises:
        RequestError: cuDNN was asked for by name and cannot run here.
    """
    missing = [
        reason
        for wrong, reason in (
            (jax.default_backend() != "gpu", f"a GPU (this is {jax.default_backend()})"),
            (jnp.dtype(dtype).itemsize != 2, "compute_dtype bfloat16"),
            (not plain, "no attention dropout and no segment ids"),
        )
        if wrong
    ]
    if implementation == "cudnn" and missing:
        raise RequestError(f"attention.implementation=cudnn needs {' and '.join(missing)}; use auto or xla")
    return "cudnn" if implementation != "xla" and not missing else "xla"


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
