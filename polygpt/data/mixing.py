"""Mixtures: which source each window of training is from, as a function of the window's number.

Each prefix of windows holds each source's share to within one window; where the weights change at a step, this holds
of the windows since then. Shares are whole numbers; they are dealt out
by earliest deadline first (Tijdeman, "The chairman assignment problem", 1980): the j-th window of a source whose share
is a of d windows comes at or after position floor(j d / a) and before ceil((j + 1) d / a). That order repeats every d
windows, so any window is found without those before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from math import gcd
from typing import NamedTuple

import numpy as np

from polygpt.data.loader import Loader
from polygpt.data.windows import Arrays
from polygpt.errors import RequestError

PERIOD = 1 << 16  # shares that need a longer period are rounded to this many parts
ORDER = "earliest-deadline-1"


def whole_shares(weights: Sequence[float]) -> list[int]:
    """The weights as whole numbers whose sum is at most `PERIOD`: exactly, if that can be, or rounded.

    Raises:
        RequestError: no weight is above 0.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    if total <= 0:
        raise RequestError("data.sources: the weights sum to 0; give at least one source a weight above 0")
    scale = np.lcm.reduce([share.denominator for share in (weight / total for weight in exact)], dtype=object)
    if scale <= PERIOD:
        shares = [int(weight / total * scale) for weight in exact]
    else:
        shares = [max(1, int(weight / total * PERIOD)) if weight else 0 for weight in exact]
        missing = PERIOD - sum(shares)
        by_rest = sorted(range(len(exact)), key=lambda k: exact[k] / total * PERIOD - shares[k], reverse=missing > 0)
        for k in [k for k in by_rest if missing > 0 or shares[k] > 1][: abs(missing)]:
            shares[k] += 1 if missing > 0 else -1
    divisor = gcd(*shares)
    return [share // divisor for share in shares]


class _Period:
    """The order of sources within one period of sum(shares) windows."""

    def __init__(self, shares: Sequence[int]):
        self.shares, self.length = list(shares), sum(shares)
        active = [k for k, share in enumerate(shares) if share]
        counts = [0] * len(shares)
        self.sources = np.empty(self.length, np.int32)
        self.before = np.empty(self.length, np.int64)  # earlier windows of the same source in the period
        for position in range(self.length):
            best, best_deadline = -1, 0
            for k in active:
                count, share = counts[k], shares[k]
                if count < share and count * self.length // share <= position:
                    deadline = -(-(count + 1) * self.length // share)
                    if best < 0 or deadline < best_deadline:
                        best, best_deadline = k, deadline
            self.sources[position], self.before[position] = best, counts[best]
            counts[best] += 1
        self.positions = [np.flatnonzero(self.sources == k) for k in range(len(shares))]

    def locate(self, n: int) -> tuple[int, int]:
        """The source of window `n`, and how many windows of that source came before."""
        period, position = divmod(n, self.length)
        source = int(self.sources[position])
        return source, period * self.shares[source] + int(self.before[position])

    def counts(self, n: int) -> list[int]:
        """How many of the first `n` windows are of each source."""
        period, position = divmod(n, self.length)
        within = [int(np.searchsorted(positions, position)) for positions in self.positions]
        return [period * share + count for share, count in zip(self.shares, within, strict=True)]

    def position(self, source: int, index: int) -> int:
        """The number of the window that is the `index`-th of `source`."""
        period, rest = divmod(index, self.shares[source])
        return period * self.length + int(self.positions[source][rest])


class _Phase(NamedTuple):
    start: int
    counts: list[int]  # windows of each source before `start`
    period: _Period


class Stage(NamedTuple):
    """The weights from a window (of a `Mixture`) or a step (of a `MixedLoader`) on."""

    start: int
    weights: Sequence[float]


class Mixture:
    """The source of each window of an endless order.

    Attributes:
        shares: of each stage, whole numbers in proportion to the weights.
        limit: windows until every source of a stage has reached its limit; None if one has none.
    """

    def __init__(self, stages: Sequence[Stage], limits: Sequence[int | None] | None = None):
        """`limits` are the windows after which a source is left out; the others then share by their weights.

        Raises:
            RequestError: in some stage no weight is above 0, or no source may be read at all.
        """
        self.shares = [whole_shares(weights) for _, weights in stages]
        counts = [0] * len(self.shares[0])
        limits = [None] * len(counts) if limits is None else list(limits)
        self.phases: list[_Phase] = []
        self.limit: int | None = None
        start, ends = 0, [*(stage.start for stage in stages[1:]), None]
        for shares, end in zip(self.shares, ends, strict=True):
            while end is None or start < end:
                active = [
                    0 if limit == had else share for share, limit, had in zip(shares, limits, counts, strict=True)
                ]
                if not any(active):
                    if not self.phases:
                        raise RequestError(
                            "data.sources: no source may be read for even one window; raise or leave out epochs"
                        )
                    self.limit = start
                    return
                period = _Period(active)
                self.phases.append(_Phase(start, counts, period))
                lengths = [
                    period.position(k, limits[k] - counts[k] - 1) + 1
                    for k, share in enumerate(active)
                    if share and limits[k] is not None
                ]
                lengths += [] if end is None else [end - start]
                if not lengths:
                    return
                counts = [had + more for had, more in zip(counts, period.counts(min(lengths)), strict=True)]
                start += min(lengths)

    def _phase(self, n: int) -> _Phase:
        return next(phase for phase in reversed(self.phases) if phase.start <= n)

    def locate(self, n: int) -> tuple[int, int]:
        """The source of window `n`, and how many windows of that source came before.

        Raises:
            IndexError: every source has reached its limit by then.
        """
        if n < 0 or (self.limit is not None and n >= self.limit):
            raise IndexError(f"window {n} of {self.limit}")
        phase = self._phase(n)
        source, index = phase.period.locate(n - phase.start)
        return source, phase.counts[source] + index

    def counts(self, n: int) -> list[int]:
        """How many of the first `n` windows are of each source."""
        phase = self._phase(n if self.limit is None else min(n, self.limit - 1))
        return [had + more for had, more in zip(phase.counts, phase.period.counts(n - phase.start), strict=True)]


class MixedLoader:
    """Batches for training whose windows are from several sources, each in an order of its own.

    Attributes:
        num_windows: windows of all sources together.
        num_batches: batches in which as many windows are read as the sources have.
        order: the method and shares by which windows are ordered.
    """

    def __init__(
        self, loaders: dict[str, Loader], stages: Sequence[Stage], epochs: Sequence[float | None] | None = None
    ):
        """Loaders by the source's name, all for training with the same shape of batches.

        Stages are by step; the first begins at 0. A source is left out once its windows were read `epochs` times (None:
        never).

        Raises:
            RequestError: in some stage no weight is above 0.
        """
        self.loaders, parts = loaders, list(loaders.values())
        epochs = [None] * len(parts) if epochs is None else epochs
        limits = [None if most is None else int(most * p.num_windows) for most, p in zip(epochs, parts, strict=True)]
        first = parts[0]
        self.batch_size, self.stride, self.context_length = first.batch_size, first.stride, first.context_length
        self.mixture = Mixture([Stage(start * self.batch_size, weights) for start, weights in stages], limits)
        shares = self.mixture.shares[0] if len(stages) == 1 else [list(self.mixture.shares), [s.start for s in stages]]
        self.order = json.dumps([parts[0].order, ORDER, shares, limits])
        self.num_windows = sum(part.num_windows for part in parts)
        self.num_batches = max(1, self.num_windows // self.batch_size)
        self._parts = parts

    def batch(self, i: int, rows: Sequence[int] | None = None) -> Arrays:
        """Batch `i`, or only these `rows` of it, as `Loader.batch`.

        Raises:
            IndexError: `i` is negative, or every source has been read as often as it may be.
        """
        rows = range(self.batch_size) if rows is None else rows
        arrays = self._parts[0].empty(len(rows))
        for place, row in enumerate(rows):
            source, position = self.mixture.locate(i * self.batch_size + row)
            self._parts[source].fill(position, arrays, place)
        return arrays

    def facts(self, steps: int) -> dict[str, str]:
        """Each source's share of a run of `steps` batches, and how often it is read.

        Raises:
            RequestError: the sources, read as often as they may be, do not suffice for as many.
        """
        windows = steps * self.batch_size
        if self.mixture.limit is not None and windows > self.mixture.limit:
            raise RequestError(
                f"data.sources: with their epochs, they last for {self.mixture.limit // self.batch_size:,} steps, "
                f"training.steps is {steps:,}; train for fewer steps, or raise or leave out epochs"
            )
        counts = self.mixture.counts(windows)
        found = {
            f"data {name}": f"{count / windows:.1%} of windows, {count / loader.num_windows:.2f} epochs"
            for count, (name, loader) in zip(counts, self.loaders.items(), strict=True)
        }
        return self._parts[0].facts(steps) | found

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of everything that determines which tokens are in batch `i`."""
        parts = [[part.fingerprint for part in self._parts], self.order]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
