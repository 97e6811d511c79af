"""What happens within the layers: where heads attend, what each layer would predict, which experts take a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from polygpt.inspection.programs import padded, programs_of
from polygpt.model import Model, Params

Maps = UInt8[np.ndarray, "N T S"]


def attention_maps(model: Model, params: Params, ids: Sequence[int]) -> list[Maps | None]:
    """For each layer, the attention weights of its heads over `ids`, one byte each (`decode_weights` reads them).

    Row t holds what token t attends to. None for a layer whose attention has no weights to show (a part of a user's
    own).
    """
    maps = jax.device_get(programs_of(model.config).attention(params, padded(ids, model.config)))
    count = len(ids)
    return [None if layer is None else layer[:, :count, :count] for layer in maps]


def decode_weights(maps: UInt8[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The weights that bytes stand for: (byte / 255)². Their error is at most 0.004, and less for small weights."""
    return np.square(maps / np.float32(255))


def pool_maps(maps: Maps, side: int) -> Maps:
    """Maps of at most `side` cells along each axis, each the largest weight within it."""
    length = maps.shape[-1]
    if length <= side:
        return maps
    starts = np.arange(side) * length // side
    return np.maximum.reduceat(np.maximum.reduceat(maps, starts, axis=1), starts, axis=2)


class LensRow(NamedTuple):
    """What one layer would predict after each of some tokens: its residual stream read by the final norm and the head.

    Attributes:
        logprobs, ranks: of the tokens that follow in the text; NaN and -1 after the last one.
        entropies: in nats.
        top_tokens, top_logprobs: the likeliest tokens, the likeliest first.
    """

    logprobs: Float[np.ndarray, " count"]
    ranks: Int[np.ndarray, " count"]
    entropies: Float[np.ndarray, " count"]
    top_tokens: Int[np.ndarray, "count k"]
    top_logprobs: Float[np.ndarray, "count k"]


def logit_lens(model: Model, params: Params, ids: Sequence[int], start: int, count: int, top: int = 5) -> list[LensRow]:
    """A row for each layer, of the positions `start` to `start + count`, which lie within `ids` (nostalgebraist 2020).

    The last layer's row is the model's own prediction.
    """
    tokens = padded(ids, model.config)
    length = tokens.shape[1]
    width = min(-(-count // 8) * 8, length)  # few widths are compiled
    first = min(start, length - width)
    targets = np.roll(tokens[0], -1)[first : first + width]
    k = min(top, model.config.vocab_size)
    judged = jax.device_get(programs_of(model.config).lens(params, tokens, targets, np.int32(first), k))
    offset = start - first
    rows = [LensRow(*(part[layer, offset : offset + count] for part in judged)) for layer in range(len(judged[0]))]
    if start + count == len(ids):  # nothing follows the last token
        rows = [
            row._replace(logprobs=np.append(row.logprobs[:-1], np.float32(np.nan)), ranks=np.append(row.ranks[:-1], -1))
            for row in rows
        ]
    return rows


def expert_shares(model: Model, params: Params, ids: Sequence[int]) -> list[Float[np.ndarray, "T E"] | None]:
    """For each layer, the weight of each expert in the output of each token; None for a layer without experts."""
    shares = jax.device_get(programs_of(model.config).experts(params, padded(ids, model.config)))
    return [None if layer is None else layer[: len(ids)] for layer in shares]
