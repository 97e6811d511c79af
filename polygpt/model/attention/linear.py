"""`linear`: attention whose kernel factorises, so that it is a recurrence with a state of fixed size.

(Katharopoulos et al. 2020.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped
from pydantic import Field, PositiveInt, model_validator

from polygpt.kernels import sharded_over_heads
from polygpt.model.attention.projections import HeadsConfig, Projections
from polygpt.model.parts import Context, Initializer, Scope
from polygpt.model.rope import Rotation, rotate

if TYPE_CHECKING:
    from polygpt.model.config import ModelConfig


class LinearAttentionConfig(HeadsConfig):
    """y_t = Σ_{s≤t} γ^(t-s) (R_t φ(q_t))·(R_s φ(k_s)) v_s / (Σ_{s≤t} γ^(t-s) φ(q_t)·φ(k_s) + eps), φ(x) = elu(x) + 1.

    (Katharopoulos et al. 2020, eq. 8-12.) R is the rotation of `position: rope`, which applies to the numerator only
    (Su et al. 2021, eq. 19); without rope it is the identity.

    Attributes:
        decay: γ_k = 1 - 2^(-5-k) for key head k = 0, 1, ... (Sun et al. 2023, RetNet, eq. 8); otherwise γ = 1.
        chunk: tokens mixed by one product in training; it changes the speed, not the result.
        eps: keeps the denominator from 0.
    """

    kind: Literal["linear"] = "linear"
    decay: bool = False
    chunk: Annotated[PositiveInt, Scope.EXECUTION] = 64
    eps: Annotated[float, Field(gt=0, le=1e-1)] = 1e-6

    @model_validator(mode="before")
    @classmethod
    def _no_window(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("window") is not None:
            raise ValueError(
                f"window={data['window']} does not go with kind=linear, whose state holds all that came before; "
                "use kind=local for a window, or decay=true to forget"
            )
        return data

    def check(self, model: ModelConfig) -> None:
        super().check(model)
        if model.position.kind == "alibi":
            raise ValueError(
                "position.kind=alibi does not go with attention.kind=linear, which has no scores to subtract from; "
                "decay=true is its way to prefer what is near"
            )

    def flops_per_token(self, model: ModelConfig) -> int:
        # Within the chunk as softmax over `chunk` positions; then the query's product with the state and its update.
        return 4 * self.num_heads * self.head_size(model) * (self.chunk + self.head_size(model))

    def build(self, model: ModelConfig, init: Initializer) -> LinearAttention:
        return LinearAttention(self, model, init)

    def init_state(self, model: ModelConfig, batch: int, length: int) -> LinearState:
        heads, size = self.kv_heads, self.head_size(model)
        return LinearState(
            jnp.zeros((batch, heads, size, size), jnp.float32), jnp.zeros((batch, heads, size), jnp.float32)
        )


class LinearState(NamedTuple):
    """The recurrent state, a summary of all tokens so far, float32.

    Attributes:
        values: Σ_s γ^(t-s) R_s φ(k_s) v_sᵀ, [B, K, H, H].
        keys: Σ_s γ^(t-s) φ(k_s), [B, K, H].
    """

    values: Float[Array, "B K H H"]
    keys: Float[Array, "B K H"]


class LinearAttention(Projections):
    def __init__(self, config: LinearAttentionConfig, model: ModelConfig, init: Initializer):
        super().__init__(config, model, init)
        self.config = config

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, state: LinearState | None = None
    ) -> tuple[Float[Array, "B T D"], LinearState | None]:
        q, k, v = self.project(x)
        # log γ of each key head. By log1p, because 1 - 2^(-5-k) is rounded to 1 for large k.
        decay = np.log1p(-(2.0 ** (-5 - np.arange(k.shape[2])))) * self.config.decay
        decay = jnp.asarray(decay, jnp.float32)
        rows = _Rows(context.rotations.get(q.shape[-1]), context.valid, context.segment_ids)
        if state is None or context.fresh:
            context.record("attention", lambda: _weights(_streams(q, k, v, rows), context, decay, self.config.eps))
        if state is not None:
            mixed, after = _mix(q, k, v, rows, decay, state, self.config)
            return self.merge(mixed.astype(x.dtype)), after

        def own(q: Array, k: Array, v: Array, rows: _Rows, _: None, decay: Array, key: None) -> Array:
            batch, _, heads, size = k.shape
            start = LinearState(jnp.zeros((batch, heads, size, size)), jnp.zeros((batch, heads, size)))
            return _mix(q, k, v, rows, decay, start, self.config)[0]

        return self.merge(sharded_over_heads(own, q, k, v, rows, kv_heads=decay).astype(x.dtype)), None


class _Rows(NamedTuple):
    """What else there is for each token."""

    rotation: Rotation | None
    valid: Bool[Array, "B T"] | None
    segment_ids: Int[Array, "B T"] | None


class _Streams(NamedTuple):
    """Features of queries and keys, as they are and rotated, and values; float32."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    q_rotated: Float[Array, "B T N H"]
    k_rotated: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]


def _streams(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], rows: _Rows
) -> _Streams:
    """elu(x) + 1 of queries and keys, and the rest of the streams."""
    features = [jax.nn.elu(part.astype(jnp.float32)) + 1 for part in (q, k)]
    return _Streams(*features, *(rotate(part, rows.rotation) for part in features), v.astype(jnp.float32))


class _Chunk(NamedTuple):
    """`chunk` tokens. `ages` is Σ log γ over the chunk's tokens up to each one, padding left out."""

    streams: _Streams  # queries [B, K, G, C, H], keys and values [B, K, C, H]
    ages: Float[Array, "B K C"]
    real: Bool[Array, "B C"]
    segments: Int[Array, "B C"]


def _mix(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    rows: _Rows,
    decay: Float[Array, " K"],
    state: LinearState,
    config: LinearAttentionConfig,
) -> tuple[Float[Array, "B T N H"], LinearState]:
    """Outputs of all tokens, chunk by chunk, and the state after the last one that is not padding."""
    streams = _streams(q, k, v, rows)
    batch, length, heads = streams.k.shape[:3]
    size = min(config.chunk, length)
    padding = -length % size
    real = jnp.ones((batch, length), bool) if rows.valid is None else rows.valid
    segments = jnp.zeros((batch, length), jnp.int32) if rows.segment_ids is None else rows.segment_ids

    def chunked(x: Shaped[Array, "B T *X"], mode: str = "constant") -> Shaped[Array, "chunks B C *X"]:
        padded = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), mode=mode)
        return jnp.moveaxis(padded.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    def by_head(x: Float[Array, "B T *K H"]) -> Float[Array, "chunks B *K C H"]:
        return jnp.moveaxis(chunked(x), 2, -2)

    q, q_rotated = (by_head(x.reshape(batch, length, heads, -1, x.shape[-1])) for x in (streams.q, streams.q_rotated))
    parts = _Streams(q, by_head(streams.k), q_rotated, by_head(streams.k_rotated), by_head(streams.v))
    real = chunked(real)
    ages = jnp.cumsum(real[:, :, None] * decay[:, None], -1)
    chunks = _Chunk(parts, ages, real, chunked(segments, "edge"))
    # The products within a chunk are recomputed in the gradient: stored, they would take most of the memory.
    step = jax.checkpoint(lambda carry, chunk: _mix_chunk(carry, chunk, config.eps))
    (state, _), mixed = lax.scan(step, (state, segments[:, 0]), chunks)
    mixed = jnp.moveaxis(mixed, (0, -2), (1, 2)).reshape(batch, length + padding, -1, streams.v.shape[-1])
    return mixed[:, :length], state


def _weights(streams: _Streams, context: Context, decay: Float[Array, " K"], eps: float) -> Float[Array, "B N T T"]:
    """The share of each token's value in each output, all T × T of them; with rotations they may be negative."""
    batch, length, heads = streams.k.shape[:3]
    tokens = jnp.arange(length)
    seen = jnp.broadcast_to(tokens[:, None] >= tokens, (batch, length, length))
    if context.segment_ids is not None:
        seen = seen & (context.segment_ids[:, :, None] == context.segment_ids[:, None, :])
    age = jnp.maximum(tokens[:, None] - tokens, 0) * decay[:, None, None]
    weight = jnp.where(seen[:, None, None], jnp.exp(age)[:, None], 0)

    def products(q: Float[Array, "B T N H"], k: Float[Array, "B T K H"]) -> Float[Array, "B K G T T"]:
        grouped = q.reshape(batch, length, heads, -1, q.shape[-1])
        return jnp.einsum("btkgh,bskh->bkgts", grouped, k) * weight

    denominator = products(streams.q, streams.k).sum(-1, keepdims=True) + eps
    weights = products(streams.q_rotated, streams.k_rotated) / denominator
    return weights.reshape(batch, -1, length, length)


def _mix_chunk(
    carry: tuple[LinearState, Int[Array, " B"]], chunk: _Chunk, eps: float
) -> tuple[tuple[LinearState, Int[Array, " B"]], Float[Array, "B K G C H"]]:
    """One chunk's outputs from the state before it, and the state (and its document) after."""
    (values, keys), document = carry
    (q, k, q_rotated, k_rotated, v), ages, real, segments = chunk
    tokens = jnp.arange(ages.shape[-1])
    seen = (tokens[:, None] >= tokens) & (segments[:, :, None] == segments[:, None, :]) & real[:, None, :]
    age = jnp.where(seen[:, None], ages[..., :, None] - ages[..., None, :], -jnp.inf)
    weight = jnp.exp(age)[:, :, None]  # γ^(t-s), 0 where t does not see s
    remaining = jnp.exp(ages) * (segments == document[:, None])[:, None]  # of the incoming state at each token

    within = jnp.einsum("bkgth,bksh->bkgts", q_rotated, k_rotated) * weight
    numerator = jnp.einsum("bkgts,bksi->bkgti", within, v)
    numerator = numerator + remaining[:, :, None, :, None] * jnp.einsum("bkgth,bkhi->bkgti", q_rotated, values)
    denominator = (jnp.einsum("bkgth,bksh->bkgts", q, k) * weight).sum(-1)
    denominator = denominator + remaining[:, :, None] * jnp.einsum("bkgth,bkh->bkgt", q, keys)

    last = segments[:, -1]
    to_end = jnp.exp(ages[..., -1:] - ages) * ((segments == last[:, None]) & real)[:, None]
    kept = (jnp.exp(ages[..., -1]) * (last == document)[:, None])[..., None]
    values = kept[..., None] * values + jnp.einsum("bksh,bks,bksi->bkhi", k_rotated, to_end, v)
    keys = kept * keys + jnp.einsum("bksh,bks->bkh", k, to_end)
    return (LinearState(values, keys), last), numerator / (denominator[..., None] + eps)
