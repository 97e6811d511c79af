"""The whole: tokens to logits, and to the loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from penzai import pz

from polygpt.model import ModelConfig
from polygpt.spec.block import layer
from polygpt.spec.embedding import embed, places
from polygpt.spec.named import Named, Params, along, contract, elementwise, rename, where
from polygpt.spec.norms import NORM
from polygpt.spec.position import POSITION

Tokens = Named | Int[Array, "B T"]


class Output(NamedTuple):
    """What the decoder gives.

    Attributes:
        logits: of the token after each, [batch, sequence, vocab].
        hidden: after the final norm, [batch, sequence, embed].
        losses: auxiliary losses by name, weighted and summed over layers; none in evaluation.
    """

    logits: Named
    hidden: Named
    losses: dict[str, Named]


def decoder(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    *,
    training: bool = False,
    segment_ids: Tokens | None = None,
) -> Output:
    """Embedding, position, layers, norm, head (Radford et al. 2018, eq. 2). Dropout is left out.

    `tokens` and `segment_ids` are named arrays with an axis `sequence`, or plain ones [B, T].
    """
    tokens, segment_ids = named(tokens), named(segment_ids)
    at = places(tokens.named_shape["sequence"], segment_ids)
    x = embed(config, params, tokens)
    x = POSITION[config.position.kind].add(config.position, params.get("position", {}), x, at)
    losses: dict[str, Named] = {}
    for index, parts in enumerate(config.layers):
        x, own = layer(parts, config, of_layer(config, params, index), x, at, training)
        losses = losses | {name: losses.get(name, 0.0) + loss for name, loss in own.items()}
    if config.final_norm:
        x = NORM[config.norm.kind](config.norm, params.get("final_norm", {}), x)
    return Output(head(config, params, x), x, losses)


def named(x: Tokens | None) -> Named | None:
    """Plain [B, T] with its axes' names."""
    return x if x is None or pz.nx.is_namedarray(x) else pz.nx.wrap(jnp.asarray(x), "batch", "sequence")


def of_layer(config: ModelConfig, params: Params, index: int) -> Params:
    """The parameters of one layer: entry i of the pattern holds those of layers i, i + P, i + 2P, ..., stacked."""
    repetition, entry = divmod(index, len(config.pattern))
    return jax.tree.map(lambda x: x[{"layers": repetition}], params["blocks"][entry], is_leaf=pz.nx.is_namedarray)


def head(config: ModelConfig, params: Params, x: Named) -> Named:
    """z = x·W, W the head's own or the embedding's (Press & Wolf 2017); z = cap · tanh(z/cap) with a soft cap.

    The last `vocab_padding` columns are no tokens.
    """
    if config.head == "none":
        z = rename(x, embed="vocab")
    else:
        z = contract(x, params["head"] if config.head == "untied" else params["embedding"], "embed")
    if config.logit_softcap is not None:
        z = config.logit_softcap * elementwise(jnp.tanh)(z / config.logit_softcap)
    return where(pz.nx.arange("vocab", config.vocab_size) < config.vocab_size - config.vocab_padding, z, -1e30)


def logits(config: ModelConfig, params: Params, tokens: Tokens, **inputs: Any) -> Named:
    """The logits of the token after each, [batch, sequence, vocab]; keyword arguments are those of `decoder`."""
    return decoder(config, params, tokens, **inputs).logits


def nll(z: Named, targets: Tokens) -> Named:
    """-log softmax(z)[target] = log Σ_v exp z_v - z_target, nats a token (Radford et al. 2018, eq. 1)."""
    return along(jax.nn.logsumexp, z, "vocab") - z[{"vocab": named(targets)}]


def loss(config: ModelConfig, params: Params, tokens: Tokens, targets: Tokens, **inputs: Any) -> Named:
    """What training lowers: the mean over tokens of their nats, plus the auxiliary losses."""
    out = decoder(config, params, tokens, training=True, **inputs)
    nats = nll(out.logits, targets)
    return along(jnp.mean, nats, *nats.named_shape) + sum(out.losses.values())
