"""A thread beside the engine for other computations: scores of a prompt, beams, looks inside the model."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from polygpt.server.errors import ApiError

T = TypeVar("T")


class BackgroundWorker:
    """Runs one computation at a time beside the engine, in the order in which they come.

    Attributes:
        limit: computations that may run or wait.
        waiting: those that do.
    """

    def __init__(self, name: str, limit: int):
        self.limit, self.waiting = limit, 0
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"background {name}", daemon=True)

    async def run(self, compute: Callable[..., T], *arguments: Any) -> T:
        """What `compute(*arguments)` gives. One that is cancelled before it begins is left out.

        Raises:
            ApiError: too many wait (429).
            Exception: what the computation raises.
        """
        if self.waiting >= self.limit:
            message = f"{self.waiting} computations wait already; try again later"
            raise ApiError(429, message, code="queue_full", headers={"retry-after": "1"})
        if not self._thread.is_alive():
            self._thread.start()
        loop, done = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def settle(value: Any, error: Exception | None) -> None:
            if not done.done():
                done.set_result(value) if error is None else done.set_exception(error)

        def work() -> None:
            if done.cancelled():
                return
            value, failed = None, None
            try:
                value = compute(*arguments)
            except Exception as error:
                failed = error
            try:
                loop.call_soon_threadsafe(settle, value, failed)
            except RuntimeError:  # the loop has ended
                return

        self.waiting += 1
        self._queue.put(work)
        try:
            return await done
        finally:
            self.waiting -= 1

    def close(self, seconds: float) -> bool:
        """Ends the thread after what it computes now; returns whether it has ended within so many seconds."""
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            work()
