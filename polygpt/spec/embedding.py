"""Tokens become vectors, and know their positions."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from penzai import pz

from polygpt.model import ModelConfig
from polygpt.spec.named import Named, Params, as_keys


class Places(NamedTuple):
    """Where each token is.

    Attributes:
        index: its place in the row, from 0, [sequence].
        document: the number of its document in a packed row, [..., sequence].
        position: its place in its document, from 0, [..., sequence].
    """

    index: Named
    document: Named
    position: Named


def places(length: int, segment_ids: Named | None = None) -> Places:
    """The places of a row of tokens. A document is a run of equal segment ids; without ids there is one."""
    index = pz.nx.arange("sequence", length)
    if segment_ids is None:
        return Places(index, pz.nx.zeros({"sequence": length}, jnp.int32), index)
    ids = segment_ids.untag("sequence")
    begins = pz.nx.nmap(lambda ids: jnp.concatenate([jnp.zeros(1, bool), ids[1:] != ids[:-1]]))(ids)
    first = pz.nx.nmap(lambda begins: jnp.maximum.accumulate(jnp.where(begins, jnp.arange(length), 0)))(begins)
    return Places(index, begins.cumsum().tag("sequence"), index - first.tag("sequence"))


def visible(at: Places, window: int | None = None) -> Named:
    """The mask of causality, [..., sequence, key_sequence].

    A token sees the tokens of its own document up to itself, and with a window the last `window` of them (Beltagy et
    al. 2020, section 3.1).
    """
    distance = at.index - as_keys(at.index)
    seen = (distance >= 0) & (at.document == as_keys(at.document))
    return seen if window is None else seen & (distance < window)


def embed(config: ModelConfig, params: Params, tokens: Named) -> Named:
    """x_t = scale · E[token_t], a row of the table for each token (Vaswani et al. 2017, section 3.4)."""
    scale = config.width**0.5 if config.embed_scale == "sqrt" else config.embed_scale
    return params["embedding"][{"vocab": tokens}] * scale
