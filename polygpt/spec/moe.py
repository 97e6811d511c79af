"""Mixture of experts: a router sends each token to a few of many feed-forwards.

(Shazeer et al. 2017; Lepikhin et al. 2020; Fedus et al. 2021.) Here every expert is applied to every token, and what
was not chosen is weighted with 0: what is computed, not how to compute less.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from penzai import pz

from polygpt.spec.embedding import Places
from polygpt.spec.feedforward import experts
from polygpt.spec.named import Named, Params, along, contract, elementwise, rename, softmax


def moe(config: Any, params: Params, x: Named, at: Places, training: bool) -> tuple[Named, dict[str, Named]]:
    """y_t = Σ_(e chosen by t) p_te · expert_e(x_t) + shared(x_t), p_t = softmax(x_t·W_router).

    In training with `dispatch: capacity`, what found no slot weighs 0; in evaluation all are served. (The noise that
    `router_noise` puts on the router's input in training is left out.)
    """
    logits = contract(x, params["router"], "embed")
    probabilities = softmax(logits, "expert")
    chosen = choose(config, probabilities + params.get("balance", 0.0))
    weights = probabilities[{"expert": chosen}]
    if config.normalize_weights:
        weights = weights / along(jnp.sum, weights, "choice")
    if training and config.dispatch == "capacity":
        weights = weights * served(config, chosen, probabilities)
    went = (chosen == pz.nx.arange("expert", config.num_experts)).astype(jnp.float32)
    y = contract(along(jnp.sum, weights * went, "choice"), experts(config, params, x), "expert")
    if config.shared_experts:
        y = y + experts(config, params["shared"], x)
    return y, losses(config, logits, probabilities, went) if training else {}


def choose(config: Any, probabilities: Named) -> Named:
    """The experts of the `top_k` largest probabilities, best first, [..., sequence, choice].

    The balance bias takes part here and not in the weights (Wang et al. 2024, eq. 3).
    """
    best = pz.nx.nmap(lambda row: lax.top_k(row, config.top_k)[1])
    return best(probabilities.untag("expert")).tag("choice")


def served(config: Any, chosen: Named, probabilities: Named) -> Named:
    """Whether each (token, choice) finds a slot, [..., sequence, choice].

    It does if fewer than C = max(int(capacity_factor · top_k · T / E), 1) claims before it in the order of claims go to
    the same expert (Lepikhin et al. 2020, algorithm 1).
    """
    length = chosen.named_shape["sequence"]
    slots = max(int(config.capacity_factor * config.top_k * length / config.num_experts), 1)
    rank = CLAIM_ORDER[config.claim_order](config, probabilities)

    def others(x: Named) -> Named:
        return rename(x, sequence="other_sequence", choice="other_choice")

    rivals = (others(rank) < rank) & (others(chosen) == chosen)
    return along(jnp.sum, rivals, "other_sequence", "other_choice") < slots


def by_choice(config: Any, probabilities: Named) -> Named:
    """All first choices in order of position, then all second ones (Lepikhin et al. 2020, algorithm 1)."""
    length = probabilities.named_shape["sequence"]
    return pz.nx.arange("choice", config.top_k) * length + pz.nx.arange("sequence", length)


def by_weight(config: Any, probabilities: Named) -> Named:
    """All first choices, then all second ones, tokens in order of their largest probability (Riquelme et al. 2021)."""
    length = probabilities.named_shape["sequence"]
    largest, index = along(jnp.max, probabilities, "expert"), pz.nx.arange("sequence", length)
    theirs, their_index = rename(largest, sequence="other_sequence"), rename(index, sequence="other_sequence")
    before = (theirs > largest) | ((theirs == largest) & (their_index < index))
    return pz.nx.arange("choice", config.top_k) * length + along(jnp.sum, before, "other_sequence")


def by_token(config: Any, probabilities: Named) -> Named:
    """Each token all its choices before the next token: the one order that is causal."""
    length = probabilities.named_shape["sequence"]
    return pz.nx.arange("sequence", length) * config.top_k + pz.nx.arange("choice", config.top_k)


CLAIM_ORDER = {"choice": by_choice, "weight": by_weight, "token": by_token}


def losses(config: Any, logits: Named, probabilities: Named, went: Named) -> dict[str, Named]:
    """The auxiliary losses, weighted.

    load_balance: E · Σ_e f_e P_e, f_e the share of choices that fell on e (dropped ones included), P_e its mean
    probability (Fedus et al. 2021, eq. 4-6). z_loss: the mean of (log Σ_e exp z_e)² (Zoph et al. 2022, eq. 5).
    """

    def mean_over_tokens(x: Named) -> Named:
        return along(jnp.mean, x, *(name for name in x.named_shape if name != "expert"))

    balance = contract(mean_over_tokens(went), mean_over_tokens(probabilities), "expert") * config.num_experts
    squares = elementwise(jnp.square)(along(jax.nn.logsumexp, logits, "expert"))
    return {
        "load_balance": config.load_balance_loss * balance,
        "z_loss": config.z_loss * mean_over_tokens(squares),
    }
