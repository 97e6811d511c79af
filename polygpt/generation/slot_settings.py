"""What the requests in the slots ask for, as arrays with a row for each: settings are data, and compile nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int, UInt32

from polygpt.generation.penalties import Penalties, stack_penalties
from polygpt.generation.requests import Request
from polygpt.generation.sampling import NOT_FINITE, Sampler, Sampling, stack_samplers

# Stop tokens a row has room for; more double it, and each such width is compiled.
STOP_TOKENS = 8
_IDLE = Request((0,), 1, Sampler(temperature=0.0))


class SlotSettings(NamedTuple):
    """What each of B rows asks for.

    Attributes:
        sampling: how its tokens are chosen.
        penalties: what changes the logits before that.
        seed: of its random numbers.
        limit: tokens in the sequence, prompt included, at which it ends.
        stop_tokens: ids that end it; filled up with ids that no token has.
        logprobs: how many of the likeliest are wanted; -1 for no log probabilities.
    """

    sampling: Sampling
    penalties: Penalties
    seed: UInt32[Array, "B"]
    limit: Int[Array, "B"]
    stop_tokens: Int[Array, "B S"]
    logprobs: Int[Array, "B"]


def settings_of(requests: Sequence[Request | None], longest: int) -> SlotSettings:
    """The arrays of the requests; None is a free slot. Sequences end at `longest` tokens."""
    rows = [_IDLE if request is None else request for request in requests]
    samplers = [request.sampler for request in rows]
    width = STOP_TOKENS
    while width < max(len(request.stops) for request in rows):
        width *= 2
    stops = np.full((len(rows), width), NOT_FINITE, np.int32)
    for row, request in zip(stops, rows, strict=True):
        row[: len(request.stops)] = request.stops
    limits = [request.limit(longest) for request in rows]
    logprobs = [-1 if request.logprobs is None else request.logprobs for request in rows]
    return SlotSettings(
        stack_samplers(samplers),
        stack_penalties(samplers),
        np.array([request.seed for request in rows], np.uint32),
        np.array(limits, np.int32),
        stops,
        np.array(logprobs, np.int32),
    )
