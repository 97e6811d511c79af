"""The shapes of batches: each new shape costs a compilation, too few cost padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import jax

from polygpt.model import Model

# FLOPs of the time that compiling one more program takes: about 1 s of CPU time on two cores (0.7 s a plain program,
# 1.1 s one that goes on from a state, at 30 scanned layers). Those of accelerators are guesses, not measured.
_COMPILING = {"cpu": 1.5e11, "gpu": 5e13, "tpu": 5e13}
# Tokens in a batch, enough to keep the device busy; and bytes of decoding state that are held at most.
_TOKENS = {"cpu": 1024, "gpu": 32768, "tpu": 32768}
_STATE_BYTES = {"cpu": 2**29, "gpu": 2**32, "tpu": 2**32}
STEP = 4  # widths are multiples of it


def token_budget() -> int:
    """Tokens in a batch."""
    return _TOKENS[jax.default_backend()]


def states_held(model: Model, length: int) -> int:
    """How many decoding states of `length` tokens are held at a time, at least 1."""
    return max(1, _STATE_BYTES[jax.default_backend()] // max(model.state_bytes(length), 1))


def compiling_tokens(model: Model) -> float:
    """The tokens that the model reads in the time that compiling one more program takes."""
    return _COMPILING[jax.default_backend()] / (2 * max(model.num_active_parameters, 1))


def widths(lengths: Iterable[int], price: float) -> list[int]:
    """The widths that rows of these lengths are best padded to, ascending; the last holds the longest.

    They make Σ (width of each row) + price · (number of widths) the smallest, by dynamic programming.
    """
    counts = Counter(map(rounded, lengths))
    sizes = sorted(counts)
    # best[i]: the cost of the i shortest sizes, and where the last width's rows begin.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(sizes) + 1):
        rows, found = 0, (float("inf"), 0)
        for start in reversed(range(stop)):
            rows += counts[sizes[start]]
            found = min(found, (best[start][0] + rows * sizes[stop - 1] + price, start))
        best.append(found)
    chosen, stop = [], len(sizes)
    while stop:
        chosen.append(sizes[stop - 1])
        stop = best[stop][1]
    return chosen[::-1]


def rounded(length: int) -> int:
    """`length` rounded up to a multiple of `STEP`, at least one."""
    return -(-max(length, 1) // STEP) * STEP


def state_length(length: int) -> int:
    """`length` rounded up to 128, 256, ...: programs that go on from a state are compiled for its size, too."""
    return max(128, 1 << (length - 1).bit_length())


def fitting(chosen: Sequence[int], length: int) -> int:
    """The smallest of the ascending widths that holds `length`."""
    return next(width for width in chosen if width >= length)


def even(count: int, most: int) -> int:
    """The size of a batch, at most `most` (or 1), when `count` rows are divided evenly among as few as possible."""
    batches = -(-count // max(most, 1))
    return -(-count // batches)
