"""The ways in which a decoder learns the order of its tokens.

Each does one of three things: it adds to the embedding, turns queries and keys, or subtracts from the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from penzai import pz

from polygpt.spec.embedding import Places
from polygpt.spec.named import Named, Params, as_keys, elementwise, where
from polygpt.spec.rope import rope


def add_nothing(config: Any, params: Params, x: Named, at: Places) -> Named:
    """x."""
    return x


def turn_nothing(config: Any, x: Named, at: Places) -> Named:
    """x."""
    return x


def subtract_nothing(config: Any, heads: int, at: Places) -> float:
    """0."""
    return 0.0


class Position(NamedTuple):
    """What a kind of position does to embeddings, to queries and keys, and to scores."""

    add: Callable[..., Named] = add_nothing
    turn: Callable[..., Named] = turn_nothing
    penalty: Callable[..., Named | float] = subtract_nothing


def learned(config: Any, params: Params, x: Named, at: Places) -> Named:
    """x_t + P[t], a learned vector for each position (Radford et al. 2018, section 3.1)."""
    return x + params["table"][{"position": at.position}]


def sinusoidal(config: Any, params: Params, x: Named, at: Places) -> Named:
    """x_t + waves: sin(tω_i) in dimension 2i, cos(tω_i) in 2i + 1, ω_i = theta^(-2i/D) (Vaswani et al. 2017, 3.5)."""
    width = x.named_shape["embed"]
    dimension = pz.nx.arange("embed", width)
    even = dimension - dimension % 2
    angle = at.position * elementwise(lambda even: jnp.float32(config.theta) ** (-even / width))(even)
    return x + where(dimension % 2 == 0, elementwise(jnp.sin)(angle), elementwise(jnp.cos)(angle))


def alibi(config: Any, heads: int, at: Places) -> Named:
    """slope_n · (t - s), to be subtracted: each head fades with distance at its own rate (Press et al. 2022, eq. 1)."""
    slope = pz.nx.wrap(jnp.asarray(slopes(heads), jnp.float32), "heads")
    return slope * (at.index - as_keys(at.index))


def slopes(heads: int) -> list[float]:
    """2^(-8/N), 2^(-16/N), ..., 2^-8 for a power of two N of heads (Press et al. 2022, section 3).

    Otherwise those of the power of two below, then the first, third, fifth ... of the power above, as many as needed
    (the paper's code, `get_slopes`).
    """
    below = 1
    while 2 * below <= heads:
        below *= 2

    def geometric(count: int) -> list[float]:
        return [2 ** (-8 * n / count) for n in range(1, count + 1)]

    return geometric(below) + geometric(2 * below)[::2][: heads - below]


POSITION = {
    "learned": Position(add=learned),
    "sinusoidal": Position(add=sinusoidal),
    "rope": Position(turn=rope),
    "alibi": Position(penalty=alibi),
    "none": Position(),
}
