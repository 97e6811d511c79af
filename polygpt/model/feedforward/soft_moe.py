"""`soft_moe` and `causal_soft_moe`: experts work on slots, each a weighted mean of tokens (Puigcerver et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float
from pydantic import PositiveInt

from polygpt.errors import RequestError
from polygpt.model.feedforward.experts import Experts, ExpertsConfig
from polygpt.model.feedforward.pool import Pool, Token
from polygpt.model.parts import NO_EFFECTS, Context, Effects, Initializer
from polygpt.model.row_shards import sharded_over_rows

if TYPE_CHECKING:
    from polygpt.model.config import ModelConfig


class SoftMoEConfig(ExpertsConfig):
    """Slot p is Σ_t D_tp x_t with D = softmax of X·Φ over tokens; its expert transforms it; token t gets Σ_p C_tp ỹ_p.

    C is the softmax of X·Φ over slots (Puigcerver et al. 2023, eq. 1-3). X·Φ and both softmaxes are float32. In
    training D runs over all tokens of a sequence, later ones included; in evaluation and generation token t is
    computed from the sequence up to t only, prefix by prefix.

    Attributes:
        slots_per_expert: slots of each expert, every one with a learned vector of Φ.
    """

    kind: Literal["soft_moe"] = "soft_moe"
    slots_per_expert: PositiveInt

    def causal_in_training(self, model: ModelConfig) -> bool:
        return False

    def flops_per_token(self, model: ModelConfig) -> int:
        return self._flops_per_token(model, served_tokens=model.context_length)

    def _flops_per_token(self, model: ModelConfig, served_tokens: int) -> int:
        """If all slots are computed once for this many tokens. (The weights are not used once per token.)"""
        slots = self.num_experts * self.slots_per_expert
        weights = (3 if self.gated else 2) * model.width * self.mlp_dim
        experts = 2 * weights * (slots / served_tokens - self.num_experts)
        return int(4 * slots * model.width + experts)

    def init_state(self, model: ModelConfig, batch: int, length: int) -> Pool:
        return Pool.empty((batch, 1, self.num_experts, self.slots_per_expert), model.width)

    def build(self, model: ModelConfig, init: Initializer) -> SoftMoE:
        return SoftMoE(self, model, init)


class SoftMoE(Experts):
    def __init__(self, config: SoftMoEConfig, model: ModelConfig, init: Initializer):
        super().__init__(config, model.width, init)
        self.config = config
        self.phi = init.weight((model.width, config.num_experts, config.slots_per_expert), ("embed", "expert", "slot"))

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, state: Pool | None = None
    ) -> tuple[Float[Array, "B T D"], Pool | None, Effects]:
        if not context.training and state is not None:
            logits = self._logits(x)
            context.record("experts", lambda: _shares(logits))
            return (*self._prefix_by_prefix(x, logits, context, state), NO_EFFECTS)
        if context.training and context.segment_ids is not None:
            raise RequestError(
                "feedforward.kind=soft_moe mixes all tokens of a sequence in training and cannot keep packed documents "
                "(segment_ids) apart; use causal_soft_moe or moe"
            )
        y, effects = sharded_over_rows(SoftMoE._stateless, self, x, context)
        return y, None, effects

    def _stateless(
        self, x: Float[Array, "B T D"], context: Context, rows: None
    ) -> tuple[Float[Array, "B T D"], Effects]:
        logits = self._logits(x)
        context.record("experts", lambda: _shares(logits))
        if not context.training:
            return self._prefix_by_prefix(x, logits, context, None)[0], NO_EFFECTS
        slots = jnp.einsum("btes,btd->besd", jax.nn.softmax(logits, axis=1).astype(x.dtype), x)
        return self._combine(logits, self._served(slots)), NO_EFFECTS

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E S"]:
        """X·Φ in float32."""
        phi = self.phi[...].astype(jnp.float32)
        flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        logits = jnp.matmul(flat, phi.reshape(x.shape[-1], -1), precision=lax.Precision.HIGHEST)
        return logits.reshape(*x.shape[:2], *phi.shape[1:])

    def _served(self, slots: Float[Array, "B E S D"]) -> Float[Array, "B E S D"]:
        """Every slot through its expert."""
        batch, experts, count, width = slots.shape
        rows = slots.transpose(1, 0, 2, 3).reshape(experts, batch * count, width)
        return self.transform(rows).reshape(experts, batch, count, width).transpose(1, 0, 2, 3)

    def _combine(self, logits: Float[Array, "B T E S"], served: Float[Array, "B E S D"]) -> Float[Array, "B T D"]:
        """Each token's mean of the slots, weighted by its softmax over all of them."""
        weights = jax.nn.softmax(logits, axis=(-2, -1)).astype(served.dtype)
        return jnp.einsum("btes,besd->btd", weights, served)

    def _prefix_by_prefix(
        self, x: Float[Array, "B T D"], logits: Float[Array, "B T E S"], context: Context, state: Pool | None
    ) -> tuple[Float[Array, "B T D"], Pool | None]:
        """Each token from slots made of the tokens up to itself, which takes T times the experts' work."""

        def one(pool: Pool, token: Token) -> tuple[Pool, Float[Array, "B D"]]:
            pool = token.enter(pool)
            served = self._served(pool.mean(x.dtype))
            return pool, self._combine(token.logits[:, None], served)[:, 0]

        tokens = Token.sequence(x, logits, context)
        pool, y = lax.scan(one, Pool.empty(logits.shape, x.shape[-1]) if state is None else state, tokens)
        return jnp.moveaxis(y, 0, 1), None if state is None else pool


def _shares(logits: Float[Array, "B T E S"]) -> Float[Array, "B T E"]:
    """The share that each expert's slots together have in each token's output."""
    return jax.nn.softmax(logits, axis=(-2, -1)).sum(-1)


class CausalSoftMoEConfig(SoftMoEConfig):
    """`soft_moe` in blocks of tokens, causal in training as well: a block's slots are made of earlier blocks.

    For tokens of block b, D is the softmax over all tokens of blocks before b; the first block meets learned slots.
    With packed documents a token meets slots made of its own document's tokens in earlier blocks, or the learned slots
    if there are none.

    Attributes:
        block_size: tokens in a block; blocks start at multiples of it.
    """

    kind: Literal["causal_soft_moe"] = "causal_soft_moe"
    block_size: PositiveInt

    def check(self, model: ModelConfig) -> None:
        if self.block_size >= model.context_length:
            raise ValueError(
                f"block_size={self.block_size} is not less than context_length={model.context_length}: "
                "no slot would ever be made of tokens"
            )

    def causal_in_training(self, model: ModelConfig) -> bool:
        return True

    def flops_per_token(self, model: ModelConfig) -> int:
        return self._flops_per_token(model, served_tokens=self.block_size)

    def init_state(self, model: ModelConfig, batch: int, length: int) -> _Blocks:
        slots = (batch, self.num_experts, self.slots_per_expert, model.width)
        return _Blocks(super().init_state(model, batch, length), jnp.zeros(slots, model.compute_dtype))

    def build(self, model: ModelConfig, init: Initializer) -> CausalSoftMoE:
        return CausalSoftMoE(self, model, init)


class _Blocks(NamedTuple):
    """Decoding state: the pool of all tokens so far, and the experts' outputs for the current block's slots."""

    pool: Pool
    served: Float[Array, "B E S D"]


class CausalSoftMoE(SoftMoE):
    def __init__(self, config: CausalSoftMoEConfig, model: ModelConfig, init: Initializer):
        super().__init__(config, model, init)
        # Φ scores tokens; these are the contents of the first block's slots, [E, S, D].
        self.first_slots = init.weight(
            (config.num_experts, config.slots_per_expert, model.width), ("expert", "slot", "embed"), inputs=0
        )

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, state: _Blocks | None = None
    ) -> tuple[Float[Array, "B T D"], _Blocks | None, Effects]:
        if state is None:
            y, effects = sharded_over_rows(CausalSoftMoE._stateless, self, x, context)
            return y, None, effects
        logits = self._logits(x)
        context.record("experts", lambda: _shares(logits))
        if not context.fresh:
            return (*self._token_by_token(x, logits, context, state), NO_EFFECTS)
        return (*self._block_by_block(x, logits, context, state), NO_EFFECTS)

    def _stateless(
        self, x: Float[Array, "B T D"], context: Context, rows: None
    ) -> tuple[Float[Array, "B T D"], Effects]:
        logits = self._logits(x)
        context.record("experts", lambda: _shares(logits))
        return self._block_by_block(x, logits, context, None)[0], NO_EFFECTS

    def _learned(self, batch: int, dtype: jnp.dtype) -> Float[Array, "B E S D"]:
        """The experts' outputs for the learned slots."""
        served = self._served(self.first_slots[...].astype(dtype)[None])
        return jnp.broadcast_to(served, (batch, *served.shape[1:]))

    def _block_by_block(
        self, x: Float[Array, "B T D"], logits: Float[Array, "B T E S"], context: Context, state: _Blocks | None
    ) -> tuple[Float[Array, "B T D"], _Blocks | None]:
        """A sequence from its start: first the pools of all blocks, then the experts on all slots at once."""
        batch, length, width = x.shape
        size = self.config.block_size
        padding = -length % size
        count = (length + padding) // size
        ids = jnp.zeros((batch, length), jnp.int32) if context.segment_ids is None else context.segment_ids
        valid = jnp.ones((batch, length), bool) if context.valid is None else context.valid

        def cut(array: Array, mode: str = "constant") -> Array:
            padded = jnp.pad(array, [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2), mode=mode)
            return jnp.moveaxis(padded.reshape(batch, count, size, *array.shape[2:]), 1, 0)

        blocks = (cut(x), cut(logits), cut(ids, "edge"), cut(valid))
        empty = Pool.empty(logits.shape, width)

        def one(carry: tuple, block: tuple) -> tuple[tuple, tuple]:
            pool, document = carry
            x, logits, ids, valid = block
            last = ids[:, -1]
            own = Pool.of(x, logits, valid & (ids == last[:, None]))
            after = pool.where(last == document, empty).join(own)
            return (after, last), (pool.mean(x.dtype), pool.weight[:, 0, 0] > 0, document)

        (pool, _), (slots, filled, document) = lax.scan(one, (empty, ids[:, 0]), blocks)
        served = self._served(slots.reshape(count * batch, *slots.shape[2:])).reshape(slots.shape)
        learned = self._learned(batch, x.dtype)
        carried = filled[..., None] & (blocks[2] == document[..., None])  # [blocks, B, tokens]: meets earlier slots
        combine = jax.vmap(self._combine)
        early = combine(blocks[1], jnp.broadcast_to(learned, served.shape))
        y = jnp.where(carried[..., None], combine(blocks[1], served), early)
        y = jnp.moveaxis(y, 0, 1).reshape(batch, -1, width)[:, :length]
        if state is None:
            return y, None
        present = jnp.maximum(valid.sum(1) - 1, 0) // size  # the block of each row's last token
        rows = jnp.arange(batch)
        chosen = jnp.where(filled[present, rows][:, None, None, None], served[present, rows], learned)
        return y, _Blocks(pool, chosen)

    def _token_by_token(
        self, x: Float[Array, "B T D"], logits: Float[Array, "B T E S"], context: Context, state: _Blocks
    ) -> tuple[Float[Array, "B T D"], _Blocks]:
        """Decoding: the experts run only when a row starts a new block."""

        def one(state: _Blocks, token: Token) -> tuple[_Blocks, Float[Array, "B D"]]:
            begins = token.valid & (token.position % self.config.block_size == 0)
            filled = state.pool.weight[:, 0, 0] > 0

            def refreshed() -> Float[Array, "B E S D"]:
                served = self._served(state.pool.mean(x.dtype))
                served = jnp.where(filled[:, None, None, None], served, self._learned(x.shape[0], x.dtype))
                return jnp.where(begins[:, None, None, None], served, state.served)

            served = lax.cond(begins.any(), refreshed, lambda: state.served)
            y = self._combine(token.logits[:, None], served)[:, 0]
            return _Blocks(token.enter(state.pool), served), y

        state, y = lax.scan(one, state, Token.sequence(x, logits, context))
        return jnp.moveaxis(y, 0, 1), state
