"""Attention: each token gathers values from the tokens it sees. The kinds differ in the weights alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from penzai import pz

from polygpt.model import ModelConfig
from polygpt.spec.embedding import Places, visible
from polygpt.spec.named import Named, Params, affine, along, as_keys, contract, elementwise, softmax, where
from polygpt.spec.norms import rms
from polygpt.spec.position import POSITION


def attention(config: Any, model: ModelConfig, params: Params, x: Named, at: Places) -> Named:
    """y_t = Σ_n (Σ_s A_nts · v_ns) · W_out,n: head n of token t takes the share A_nts of token s's value.

    (Vaswani et al. 2017, section 3.2.) With fewer key and value heads than query heads, each serves a group of
    neighbouring query heads (Ainslie et al. 2023).
    """
    query = affine(x, params, "query", "embed")
    key = for_every_head(config, affine(x, params, "key", "embed"))
    value = for_every_head(config, affine(x, params, "value", "embed"))
    weights = ATTENTION[config.kind](config, model, params, query, key, at)
    mixed = contract(weights, as_keys(value), "key_sequence")
    return affine(mixed, params, "out", "heads", "head_dim")


def for_every_head(config: Any, x: Named) -> Named:
    """The key or value that each query head meets: head n that of kv head n // (heads a group)."""
    group = config.num_heads // config.kv_heads
    return x[{"kv_heads": pz.nx.arange("heads", config.num_heads) // group}]


def softmax_weights(config: Any, model: ModelConfig, params: Params, query: Named, key: Named, at: Places) -> Named:
    """A_nts = softmax over s of cap(scale · q_nt·k_ns) - penalty, over the tokens that t sees.

    (Vaswani et al. 2017, eq. 1.) Before, queries and keys are normalised (Dehghani et al. 2023) and rotated by the
    position, in this order. cap(z) = c · tanh(z/c) (Gemma Team 2024). The penalty is ALiBi's. A sink is one more score
    a head, with nothing to gather there, so that the weights may sum to less than 1 (Xiao et al. 2023; gpt-oss).
    """
    if config.qk_norm:
        query = rms(query, "head_dim", config.qk_norm_eps) * params["query_norm"]
        key = rms(key, "head_dim", config.qk_norm_eps) * params["key_norm"]
    position = POSITION[model.position.kind]
    query, key = (position.turn(model.position, x, at) for x in (query, key))
    scale = config.head_size(model) ** -0.5 if config.scale is None else config.scale
    scores = scale * contract(query, as_keys(key), "head_dim")
    if config.softcap is not None:
        scores = config.softcap * elementwise(jnp.tanh)(scores / config.softcap)
    scores = scores - position.penalty(model.position, config.num_heads, at)
    scores = where(visible(at, config.window), scores, -jnp.inf)
    if not config.sinks:
        return softmax(scores, "key_sequence")
    sink = params["sinks"].broadcast_to(named_shape=scores.named_shape | {"key_sequence": 1})
    weights = softmax(pz.nx.concatenate([scores, sink], "key_sequence"), "key_sequence")
    return weights[{"key_sequence": pz.slice[:-1]}]


def linear_weights(config: Any, model: ModelConfig, params: Params, query: Named, key: Named, at: Places) -> Named:
    """A_ts = γ^(t-s) (R_t φ(q_t))·(R_s φ(k_s)) / (Σ_s γ^(t-s) φ(q_t)·φ(k_s) + eps), φ(x) = elu(x) + 1.

    (Katharopoulos et al. 2020, eq. 7-9.) R turns the numerator alone, which keeps the denominator positive (Su et al.
    2021, eq. 19). Here all T × T weights are written out; that φ(q)·φ(k) factorises, so that Σ_s φ(k_s) v_s can be
    carried along as a state of fixed size, is what the kind is for.
    """
    query, key = (elementwise(lambda x: jax.nn.elu(x) + 1)(x) for x in (query, key))
    seen = where(visible(at), decay(config, at), 0.0)
    products = seen * contract(query, as_keys(key), "head_dim")
    position = POSITION[model.position.kind]
    query, key = (position.turn(model.position, x, at) for x in (query, key))
    numerator = seen * contract(query, as_keys(key), "head_dim")
    return numerator / (along(jnp.sum, products, "key_sequence") + config.eps)


def decay(config: Any, at: Places) -> Named | float:
    """γ^(t-s), with γ = 1 - 2^(-5-k) for the query heads of key head k, or 1 (Sun et al. 2023, eq. 8)."""
    if not config.decay:
        return 1.0
    gamma = elementwise(lambda k: 1 - 2.0 ** (-5 - k))(pz.nx.arange("kv_heads", config.kv_heads))
    distance = at.index - as_keys(at.index)
    past = where(distance > 0, distance, 0)  # what comes later is not seen: its power is not wanted
    return elementwise(jnp.power)(for_every_head(config, gamma), past)


ATTENTION = {"softmax": softmax_weights, "local": softmax_weights, "linear": linear_weights}
