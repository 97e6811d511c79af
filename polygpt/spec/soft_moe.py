"""Soft mixture of experts: experts work on slots, each a weighted mean of tokens (Puigcerver et al. 2023)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from polygpt.spec.embedding import Places, visible
from polygpt.spec.feedforward import experts
from polygpt.spec.named import Named, Params, along, as_keys, contract, softmax, where


def soft_moe(config: Any, params: Params, x: Named, at: Places, training: bool) -> tuple[Named, dict[str, Named]]:
    """y_t = Σ_p C_tp · expert(slot_p), slot_p = Σ_t D_tp x_t (Puigcerver et al. 2023, eq. 1-3).

    D is the softmax of X·Φ over tokens, C over slots. In training D runs over the whole sequence, so that a token gets
    something of later ones (and packed documents cannot be kept apart). In evaluation token t is computed from its
    document up to t alone: it has slots of its own.
    """
    logits = contract(x, params["phi"], "embed")
    if training:
        slots = contract(softmax(logits, "sequence"), x, "sequence")
    else:
        slots = slots_of(logits, x, visible(at))
    return combine(config, params, logits, slots), {}


def causal_soft_moe(config: Any, params: Params, x: Named, at: Places, training: bool) -> tuple[Named, dict]:
    """`soft_moe` in blocks: token t meets slots made of the tokens in earlier blocks of its document.

    Where there are none (the first block, a document's first tokens) it meets learned slots. The same in training and
    evaluation.
    """
    logits = contract(x, params["phi"], "embed")
    block = at.index // config.block_size
    seen = visible(at) & (as_keys(block) < block)
    slots = where(along(jnp.any, seen, "key_sequence"), slots_of(logits, x, seen), params["first_slots"])
    return combine(config, params, logits, slots), {}


def slots_of(logits: Named, x: Named, seen: Named) -> Named:
    """For each token the slots Σ_s D_sp x_s made of the tokens s it sees, [..., sequence, expert, slot, embed]."""
    # Not -inf: of nothing that is seen the softmax is 0/0, and its gradient would spread from rows that are not used.
    weights = softmax(where(seen, as_keys(logits), -1e30), "key_sequence")
    return contract(weights, as_keys(x), "key_sequence")


def combine(config: Any, params: Params, logits: Named, slots: Named) -> Named:
    """Σ_p C_tp · expert(slot_p), C the softmax over all slots of all experts; each expert has its own slots."""
    return contract(softmax(logits, "expert", "slot"), experts(config, params, slots), "expert", "slot")
