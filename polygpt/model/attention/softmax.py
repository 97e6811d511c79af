"""`softmax`: multi-head, grouped-query or multi-query attention (Vaswani et al. 2017; Ainslie et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int
from pydantic import Field, PositiveInt

from polygpt.model.attention.core import (
    ODD_HEAD,
    Implementation,
    attend,
    attend_positions,
    choose,
    is_odd,
    refusals,
)
from polygpt.model.attention.projections import HeadsConfig, Projections
from polygpt.model.attention.scores import ScoreInputs, ScoreRule
from polygpt.model.norms import rms_normalize
from polygpt.model.parts import Context, Initializer, Scope
from polygpt.model.rope import rotate
from polygpt.model.stacks import InStack, as_kept, as_numbers, kept_type

Positive = Annotated[float, Field(gt=0)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache(InStack):
    """Keys (already rotated) and values of the last S positions; slot s holds a position that is s modulo S.

    Attributes:
        k, v: [B, K, S, H], of all layers [layers, B, K, S, H]; the keys of a head lie together. Floats, or the bits of
            16-bit ones as unsigned integers.
        dtype: of the numbers.
    """

    k: Any
    v: Any
    dtype: str = field(metadata={"static": True})

    @property
    def slots(self) -> int:
        return self.k.shape[-2]

    def read(self) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values of the layer."""
        own = (lax.dynamic_index_in_dim(leaf, self.layer, keepdims=False) for leaf in (self.k, self.v))
        return tuple(as_numbers(leaf, self.dtype).swapaxes(1, 2) for leaf in own)

    def write(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], index: Int[Array, "B T"]) -> KVCache:
        """With these in the slots of `index`; an index beyond the last slot writes nothing."""
        rows = jnp.arange(k.shape[0])[:, None]
        where = self.layer, rows, slice(None), index
        pairs = ((self.k, k), (self.v, v))
        k, v = (old.at[where].set(as_kept(new, old.dtype), mode="drop") for old, new in pairs)
        return replace(self, k=k, v=v)


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

    def rule(self, model) -> ScoreRule:
        """How scores become probabilities. A window that spans the context is none."""
        window = self.window if self.window is not None and self.window < model.context_length else None
        return ScoreRule(self.scale or self.size(model) ** -0.5, window, self.softcap, self.dropout)

    def check(self, model) -> None:
        super().check(model)
        reasons = refusals(self.implementation, jnp.dtype(model.compute_dtype), self._extras(model))
        if reasons:
            raise ValueError(f"attention.implementation={self.implementation} needs {' and '.join(reasons)}")

    def _extras(self, model) -> dict[str, bool]:
        """What a fused kernel may not know of, by the name of its setting, and whether it is asked for."""
        rule = self.rule(model)
        return {
            "window": rule.window is not None,
            "softcap": self.softcap is not None,
            "sinks": self.sinks,
            "dropout": self.dropout > 0,
            "alibi": model.position.kind == "alibi",
            ODD_HEAD: is_odd(self.size(model)),
        }

    def implementation_name(self, model) -> str:
        dtype = jnp.dtype(model.compute_dtype)
        asked = tuple(name for name, wanted in self._extras(model).items() if wanted)
        return choose(self.implementation, dtype, model.context_length, asked)

    def flops_per_token(self, model) -> int:
        # q·kᵀ and p·v, 2 FLOPs a product, over the whole context as is the custom (PaLM, appendix B).
        return 4 * self.num_heads * self.size(model) * (self.rule(model).window or model.context_length)

    def build(self, model, init: Initializer) -> SoftmaxAttention:
        return SoftmaxAttention(self, model, init)

    def init_state(self, model, batch: int, length: int) -> KVCache:
        slots = min(length, self.rule(model).window or length)
        # A token of 8 rows took 49 ms with 16 bits kept as bits, 51 with float32, and 50 more with 16-bit floats.
        empty = jnp.zeros((batch, self.kv_heads, slots, self.size(model)), kept_type(model.compute_dtype))
        return KVCache(empty, empty, model.compute_dtype)


class SoftmaxAttention(Projections):
    def __init__(self, config: SoftmaxAttentionConfig, model, init: Initializer):
        self.config, self.rule = config, config.rule(model)
        super().__init__(config, model, init)
        size = (config.size(model),)
        self.query_norm = init.constant(1.0, size, ("head_dim",)) if config.qk_norm else None
        self.key_norm = init.constant(1.0, size, ("head_dim",)) if config.qk_norm else None
        self.sinks = init.constant(0.0, (config.num_heads,), ("heads",)) if config.sinks else None

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, state: KVCache | None = None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        q, k, v = self.project(x)
        if self.query_norm is not None:
            q = rms_normalize(q, self.query_norm[...], self.config.qk_norm_eps)
            k = rms_normalize(k, self.key_norm[...], self.config.qk_norm_eps)
        rotation = context.rotations.get(q.shape[-1])
        q, k = rotate(q, rotation), rotate(k, rotation)
        inputs = ScoreInputs(
            sinks=None if self.sinks is None else self.sinks[...].astype(jnp.float32),
            slopes=context.slopes(self.config.num_heads),
            segment_ids=context.segment_ids,
            key=context.key,
        )
        if state is None:
            return self.merge(attend(q, k, v, self.rule, inputs, self.config.implementation)), None
        last = _last_positions(context)
        after = _write(state, k, v, context.positions, last)
        if context.fresh:
            mixed = attend(q, k, v, self.rule, inputs, self.config.implementation)
        elif q.shape[1] == 1 or self.rule.window is None:  # nothing that these queries see was overwritten
            held = _held_positions(last, after)
            mixed = attend_positions(q, *after.read(), self.rule, inputs, context.positions, held)
        else:
            held = _held_positions(context.positions[:, :1] - 1, state)
            keys, values = (jnp.concatenate(pair, 1) for pair in zip(state.read(), (k, v), strict=True))
            held = jnp.concatenate([held, context.positions], 1)
            mixed = attend_positions(q, keys, values, self.rule, inputs, context.positions, held)
        return self.merge(mixed), after


def _last_positions(context: Context) -> Int[Array, "B 1"]:
    """The last position of each row that is not padding; the one before these tokens where all are."""
    positions = context.positions
    if context.valid is None:
        return positions[:, -1:]
    return jnp.where(context.valid, positions, positions[:, :1] - 1).max(1, keepdims=True)


def _write(
    state: KVCache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    last: Int[Array, "B 1"],
) -> KVCache:
    """The cache with these keys and values up to `last`, position p in slot p modulo S; padding is left out."""
    slots = state.slots
    # Of tokens that share a slot only the last may write: the order of equal indices is not defined.
    index = jnp.where((positions <= last) & (positions > last - slots), positions % slots, slots)
    return state.write(k, v, index)


def _held_positions(last: Int[Array, "B 1"], cache: KVCache) -> Int[Array, "B S"]:
    """The position that each slot holds once `last` is written; negative where none was."""
    slots = cache.slots
    return last - (last - jnp.arange(slots)) % slots
