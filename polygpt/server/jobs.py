"""A request to the API while it runs: one or more sequences in the engine, seen from the event loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from polygpt.generation import Handle, Part, Request, TextStream


@dataclass
class Work:
    """One sequence: the request to the engine, and its stream of text."""

    request: Request
    stream: TextStream | None = None


@dataclass
class Timing:
    """When things happened to one sequence, by `time.perf_counter`; None for what has not happened."""

    first: float | None = None
    last: float | None = None


class Job:
    """The sequences of one request, which begin and are cancelled together.

    Belongs to the event loop; the engine's thread hands over parts through it.

    Attributes:
        works: what is run, in the order of the choices.
        handles: of the works, once the engine's thread has submitted them.
        arrived: when the request came.
        times: of each sequence.
        tokens: how many each has so far.
        error: why the whole ended early.
    """

    def __init__(self, works: list[Work]):
        self.works = works
        self.handles: list[Handle] = []
        self.arrived = time.perf_counter()
        self.times = [Timing() for _ in works]
        self.tokens = [0] * len(works)
        self.error: Exception | None = None
        self.on_end: list[Callable[[], None]] = []
        self._left = len(works)
        self._parts: deque[tuple[int, Part]] = deque()
        # Of whoever waits in `next`, since when, and the timer that ends a wait that is too long.
        self._waiter: asyncio.Future[None] | None = None
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def ended(self) -> bool:
        """Nothing more comes from the engine."""
        return not self._left or self.error is not None

    def receive(self, index: int, part: Part) -> None:
        """A part of sequence `index` has come."""
        if self.ended:
            return
        now, timing = time.perf_counter(), self.times[index]
        if part.tokens:
            timing.first = timing.first or now
            timing.last = now
            self.tokens[index] += len(part.tokens)
        self._parts.append((index, part))
        self._wake()
        if part.finish_reason is not None:
            self._left -= 1
            if not self._left:
                self._end()

    def fail(self, error: Exception) -> None:
        """Ends all sequences with an error; those that wait for parts see it."""
        if not self.ended:
            self.error = error
            self._wake()
            self._end()

    def cached_tokens(self, prompts: int) -> int:
        """How many tokens of its `prompts` prompts the engine had read before; several samples count once."""
        samples = len(self.works) // prompts or 1
        return sum(handle.cached_tokens or 0 for handle in self.handles[::samples])

    def finish(self) -> None:
        """Ends a job that has no sequences."""
        self._end()

    async def next(self, seconds: float | None = None) -> list[tuple[int, Part]]:
        """The parts that have come since, in order; empty when the job has ended or after so many seconds.

        Raises:
            Exception: the job's error.
        """
        if not self._parts and not self.ended:
            loop = asyncio.get_running_loop()
            self._waiter, self._since = loop.create_future(), loop.time()
            if seconds is not None and self._timer is None:
                self._timer = loop.call_later(seconds, self._remind, loop, seconds)
            await self._waiter
        if self.error is not None:
            raise self.error
        parts = list(self._parts)
        self._parts.clear()
        return parts

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _remind(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        """Ends a wait of so many seconds; one timer serves all waits, since most of them end long before."""
        left = self._since + seconds - loop.time()
        self._timer = None
        if left > 0:
            self._timer = loop.call_later(left, self._remind, loop, seconds)
        else:
            self._wake()

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for call in self.on_end:
            call()
        self.on_end.clear()
