"""Attention by JAX's own Pallas kernel for TPUs ("splash" attention), which skips blocks that no query sees."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from polygpt.kernels.scores import ScoreInputs, ScoreRule

# The kernel's blocks are multiples of a TPU's lanes.
LANES = 128


def pallas_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    rule: ScoreRule,
    inputs: ScoreInputs,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal attention with window, soft cap, sinks and segment ids; `interpret` runs the kernel's program on a CPU."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    length = q.shape[1]
    padding = -length % LANES  # at the end, where no real query sees it

    def by_head(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    kernel = _kernel(q.shape[2], length + padding, rule.window, rule.softcap, interpret)
    segments = None
    if inputs.segment_ids is not None:
        ids = jnp.pad(inputs.segment_ids, ((0, 0), (0, padding)), constant_values=-1)
        segments = SegmentIds(ids, ids)
    run = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, ids, inputs.sinks))
    out = run(by_head(rule.scaled(q)), by_head(k), by_head(v), segments)
    return out.transpose(0, 2, 1, 3)[:, :length].astype(q.dtype)


@lru_cache(maxsize=32)
def _kernel(
    heads: int, length: int, window: int | None, softcap: float | None, interpret: bool
) -> Callable[..., Array]:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in (512, 256, 128) if length % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    with jax.ensure_compile_time_eval():  # the mask's tables are constants, even if made while tracing
        return splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )
