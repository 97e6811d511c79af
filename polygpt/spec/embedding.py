"""Tokens become vectors, and know where they stand."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from penzai import pz

from polygpt.model import ModelConfig
from polygpt.spec.named import Named, Params, as_keys


class Places(NamedTuple):
    """Where each token stands.

    Attributes:
        index: its place in the row, from 0, [sequence].
        document: the number of its document in a packed row, [..., sequence].
    """

    index: Named
    document: Named


def places(length: int, segment_ids: Named | None = None) -> Places:
    """The places of a row of tokens. A document is a run of equal segment ids; without ids there is one."""
    index = pz.nx.arange("sequence", length)
    if segment_ids is None:
        document = pz.nx.zeros({"sequence": length}, jnp.int32)
    else:
        ids = segment_ids.untag("sequence")
        begins = pz.nx.nmap(lambda ids: jnp.concatenate([jnp.zeros(1, bool), ids[1:] != ids[:-1]]))(ids)
        document = begins.cumsum().tag("sequence")
    return Places(index, document)


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
