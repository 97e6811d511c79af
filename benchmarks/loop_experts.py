"""The obvious way to run experts, for comparison: a loop over them, each on every token, weighted (often by zero)."""

from __future__ import annotations

import jax

from polygpt.model import NO_EFFECTS
from polygpt.model.feedforward.moe import MoE, MoEConfig


class LoopConfig(MoEConfig):
    """`moe` without dispatch."""

    kind: str

    def build(self, model, init):
        return Loop(self, model, init)


class Loop(MoE):
    def __call__(self, x, context, state=None):
        _, choices, weights = self._route(x, context)
        y = 0
        for e in range(self.config.num_experts):
            weight = ((choices == e) * weights).sum(-1, keepdims=True).astype(x.dtype)
            flat = x.reshape(-1, x.shape[-1])
            hidden = jax.nn.silu(flat @ self.gate[e]) * (flat @ self.up[e])
            y = y + weight * (hidden @ self.down[e]).reshape(x.shape)
        return y, None, NO_EFFECTS
