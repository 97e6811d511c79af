"""`softmax`: multi-head, grouped-query or multi-query attention (Vaswani et al. 2017; Ainslie et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field, PositiveInt

from polygpt.kernels import (
    AttentionSpec,
    Implementation,
    KVCache,
    ScoreInputs,
    ScoreRule,
    attention,
    attention_weights,
    cached_attention,
    choose_attention,
    prefers_cache,
    reference_attention,
)
from polygpt.model.attention.projections import HeadsConfig, Projections
from polygpt.model.norms import rms_normalize
from polygpt.model.parts import Context, Initializer, Scope
from polygpt.model.rope import rotate

if TYPE_CHECKING:
    from polygpt.model.config import ModelConfig

Positive = Annotated[float, Field(gt=0)]


class SoftmaxAttentionConfig(HeadsConfig):
    """softmax(scale · q·kᵀ)·v over earlier positions; `num_kv_heads` keys and values serve `num_heads` queries.

    Attributes:
        dropout: share of attention probabilities dropped in training.
        window: a query sees this many positions, its own included; None sees all. Time and memory then grow with
            T·window and the cache is a ring (Beltagy et al. 2020; Jiang et al. 2023).
        qk_norm: queries and keys are RMS-normalised over H, with a gain [H] each, before they are rotated
            (Dehghani et al. 2023; Qwen3).
        qk_norm_eps: epsilon of those norms.
        softcap: scores become softcap · tanh(scores / softcap), after scaling and before the ALiBi penalty
            (Gemma Team 2024).
        sinks: a learned logit a head, at first 0, joins the softmax and carries no value (gpt-oss; Xiao et al. 2023).
        scale: of the scores; None means 1/sqrt(H).
        implementation: `xla`; `cudnn` (NVIDIA, 16-bit); `pallas` (TPU); `auto`, the fastest that can run.
    """

    kind: Literal["softmax"] = "softmax"
    dropout: Annotated[float, Field(ge=0, lt=1), Scope.TRAINING] = 0.0
    window: PositiveInt | None = None
    qk_norm: bool = False
    qk_norm_eps: Annotated[float, Field(gt=0, le=1e-1)] = 1e-6
    softcap: Positive | None = None
    sinks: bool = False
    scale: Positive | None = None
    implementation: Annotated[Implementation, Scope.EXECUTION] = "auto"

    def rule(self, model: ModelConfig) -> ScoreRule:
        """How scores become probabilities. A window that spans the whole context is dropped."""
        window = self.window if self.window is not None and self.window < model.context_length else None
        return ScoreRule(self.scale or self.head_size(model) ** -0.5, window, self.softcap, self.dropout)

    def spec(self, model: ModelConfig) -> AttentionSpec:
        """What is asked of the kernel at full context."""
        extras = {"sinks": self.sinks, "alibi": model.position.kind == "alibi"}
        return AttentionSpec.of(
            self.rule(model), model.compute_dtype, model.context_length, self.head_size(model), **extras
        )

    def check(self, model: ModelConfig) -> None:
        super().check(model)
        obstacles = self.spec(model).obstacles(self.implementation)
        if obstacles:
            raise ValueError(f"attention.implementation={self.implementation} needs {' and '.join(obstacles)}")

    def implementation_name(self, model: ModelConfig) -> str:
        return choose_attention(self.implementation, self.spec(model))

    def flops_per_token(self, model: ModelConfig) -> int:
        # q·kᵀ and p·v, 2 FLOPs a product, over the whole context as is the custom (PaLM, appendix B).
        return 4 * self.num_heads * self.head_size(model) * (self.rule(model).window or model.context_length)

    def build(self, model: ModelConfig, init: Initializer) -> SoftmaxAttention:
        return SoftmaxAttention(self, model, init)

    def init_state(self, model: ModelConfig, batch: int, length: int) -> KVCache:
        slots = min(length, self.rule(model).window or length)
        return KVCache.empty(batch, self.kv_heads, slots, self.head_size(model), model.compute_dtype)


class SoftmaxAttention(Projections):
    def __init__(self, config: SoftmaxAttentionConfig, model: ModelConfig, init: Initializer):
        self.config, self.rule = config, config.rule(model)
        super().__init__(config, model, init)
        size = (config.head_size(model),)
        self.query_norm = init.constant(1.0, size, ("head_dim",)) if config.qk_norm else None
        self.key_norm = init.constant(1.0, size, ("head_dim",)) if config.qk_norm else None
        self.sinks = init.constant(0.0, (config.num_heads,), ("heads",)) if config.sinks else None

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, state: KVCache | None = None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        q, k, v = self.project(x)
        if self.query_norm is not None:
            q = rms_normalize(q, self.query_norm[...], eps=self.config.qk_norm_eps)
            k = rms_normalize(k, self.key_norm[...], eps=self.config.qk_norm_eps)
        rotation = context.rotations.get(q.shape[-1])
        q, k = rotate(q, rotation), rotate(k, rotation)
        inputs = ScoreInputs(
            sinks=None if self.sinks is None else self.sinks[...].astype(jnp.float32),
            slopes=context.slopes(self.config.num_heads),
            segment_ids=context.segment_ids,
            key=context.key,
        )
        if state is None or context.fresh:
            context.record("attention", lambda: attention_weights(q, k, self.rule, inputs))
        if state is None:
            return self.merge(attention(q, k, v, self.rule, inputs, self.config.implementation)), None
        last = _last_positions(context)
        after = state.write(k, v, context.positions, last)
        complete = self.rule.window is None  # the cache; a ring's oldest keys are overwritten by these
        over_cache = complete and self.config.implementation == "auto" and prefers_cache(q, after, inputs)
        if context.fresh and not over_cache:
            mixed = attention(q, k, v, self.rule, inputs, self.config.implementation)
        elif q.shape[1] == 1 or complete:  # nothing that these queries see was overwritten
            reach = jnp.where(_counts(context), last, -1).max()
            mixed = cached_attention(q, after, self.rule, inputs, context.positions, last, reach)
        else:
            held = state.positions(context.positions[:, :1] - 1)
            keys, values = (jnp.concatenate(pair, 1) for pair in zip(state.read(), (k, v), strict=True))
            held = jnp.concatenate([held, context.positions], 1)
            mixed = reference_attention(q, keys, values, self.rule, inputs, context.positions, held)
        return self.merge(mixed), after


def _counts(context: Context) -> Bool[Array, "B 1"]:
    """Which rows have tokens that are not padding."""
    if context.valid is None:
        return jnp.ones((context.positions.shape[0], 1), bool)
    return context.valid.any(1, keepdims=True)


def _last_positions(context: Context) -> Int[Array, "B 1"]:
    """The last position of each row that is not padding; the one before these tokens if all are padding."""
    positions = context.positions
    if context.valid is None:
        return positions[:, -1:]
    return jnp.where(context.valid, positions, positions[:, :1] - 1).max(1, keepdims=True)
