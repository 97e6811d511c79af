"""The thread that owns an engine: the event loop hands it jobs and is handed parts.

Nothing else touches the engine, so the loop never waits for a step. Whatever fails in a step ends all jobs, and the
engine is made anew.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from polygpt.errors import RequestError
from polygpt.generation import Engine, Handle, Part, Request, Sampler, Statistics
from polygpt.server.errors import ApiError, as_api_error, invalid, unavailable
from polygpt.server.jobs import Job

logger = logging.getLogger("polygpt.server")
# Seconds before an engine that failed is tried again; doubled each time up to the last.
FIRST_PAUSE, LAST_PAUSE = 0.1, 30.0
_NOTHING = Statistics(*[0] * len(Statistics._fields))
_PROBE = Request((0,), 1, Sampler(temperature=0.0))


class _Event(NamedTuple):
    """What the engine's thread tells the loop: a part of a sequence of a job, or an error that ends the job."""

    job: Job
    index: int
    part: Part | Exception


class Runner:
    """Runs jobs through an engine in a thread of its own.

    Attributes:
        slots, queue: as the engine's and the settings'.
        jobs: those that run or wait.
        in_flight: sequences that were taken in and have not ended.
        healthy: the engine works; False while it is being made anew.
        restarts: how often it was.
    """

    def __init__(self, make_engine: Callable[[], Engine], name: str, slots: int, queue: int):
        self.name, self.slots, self.queue = name, slots, queue
        self.in_flight, self.restarts, self.healthy = 0, 0, True
        self.jobs: set[Job] = set()
        self._make_engine = make_engine
        self._engine: Engine | None = make_engine()
        self._live: dict[Handle, tuple[Job, int]] = {}
        self._commands: deque[tuple[Callable[[Job], None], Job]] = deque()
        self._wake, self._closing = threading.Condition(), False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._seconds = 1.0  # that a sequence takes, averaged

    # --- What the event loop calls ------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread; called within the running loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self, seconds: float = 10.0) -> bool:
        """Stops the thread after its current step; returns whether it has ended within so many seconds."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Queues a job.

        Raises:
            ApiError: the queue is full (429) or the engine is down (503); 400 if it could never be taken.
        """
        count = len(job.works)
        if count > self.slots + self.queue:
            most = self.slots + self.queue
            raise invalid(f"the request asks for {count} sequences at once; this server takes {most} in all")
        if not self.healthy:
            raise unavailable("the engine has failed and is being restarted; try again", "engine_failed")
        if self.in_flight + count > self.slots + self.queue:
            waiting = max(self.in_flight - self.slots, 0)
            message = f"the queue is full: {waiting} sequences wait and at most {self.queue} may; try again later"
            seconds = min(max(math.ceil(self._seconds * (waiting + 1) / self.slots), 1), 60)
            raise ApiError(429, message, code="queue_full", headers={"retry-after": str(seconds)})
        self.in_flight += count
        self.jobs.add(job)
        job.on_end.append(lambda: self._ended(job))
        if count:
            self._send(self._submit, job)
        else:
            job.finish()

    def abort(self, job: Job, error: Exception) -> None:
        """Ends a job with an error; its slots are free from the engine's next step on."""
        if not job.ended:
            job.fail(error)
            self._send(self._cancel, job)

    def abort_all(self, error: Exception) -> None:
        """Ends every job with an error."""
        for job in list(self.jobs):
            self.abort(job, error)

    def compile(self) -> None:
        """Compiles the engine's programs; before `start`."""
        self._engine.compile()

    @property
    def statistics(self) -> Statistics:
        """The engine's, all zeros while there is none."""
        engine = self._engine
        return _NOTHING if engine is None else engine.statistics

    @property
    def load(self) -> tuple[int, int]:
        """Sequences in slots, and sequences that wait for one."""
        statistics = self.statistics
        return statistics.slots_in_use, statistics.queued

    def _ended(self, job: Job) -> None:
        self.in_flight -= len(job.works)
        self.jobs.discard(job)
        last = max((timing.last or 0.0 for timing in job.times), default=0.0)
        if job.error is None and last:
            self._seconds += 0.1 * (last - job.arrived - self._seconds)

    def _send(self, command: Callable[[Job], None], job: Job) -> None:
        with self._wake:
            self._commands.append((command, job))
            self._wake.notify()

    def _receive(self, events: list[_Event]) -> None:
        for job, index, part in events:
            if isinstance(part, Exception):
                self.abort(job, as_api_error(part))
            else:
                job.receive(index, part)

    # --- The thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._take():
            try:
                self._tell(self._events(self._engine.step()))
                continue
            except Exception as error:
                logger.error("the engine of %s failed; it is restarted", self.name, exc_info=error)
            self._restart()  # here nothing refers to the error any more, nor through its traceback to the old engine

    def _take(self) -> bool:
        """Waits for something to do and takes the commands in; False when the thread is to end."""
        with self._wake:
            while not self._commands and self._engine.idle and not self._closing:
                self._wake.wait()
            commands = list(self._commands)
            self._commands.clear()
        for command, job in commands:
            command(job)
        return not self._closing

    def _submit(self, job: Job) -> None:
        if job.ended:
            return
        try:
            for index, work in enumerate(job.works):
                handle = self._engine.submit(work.request, work.stream)
                job.handles.append(handle)
                self._live[handle] = (job, index)
        except RequestError as error:
            self._cancel(job)
            self._tell([_Event(job, 0, invalid(str(error)))])

    def _cancel(self, job: Job) -> None:
        for handle in job.handles:
            self._live.pop(handle, None)
            handle.cancel()

    def _events(self, parts: list[tuple[Handle, Part]]) -> list[_Event]:
        """What a step gave; handles that have ended are forgotten."""
        events = [_Event(*self._live[handle], part) for handle, part in parts if handle in self._live]
        told = {handle for handle, part in parts if part.finish_reason is not None}
        for handle in [handle for handle in self._live if handle.ended]:
            job, index = self._live.pop(handle)
            if handle.error is not None:
                events.append(_Event(job, index, handle.error))
            elif handle not in told:  # it had no room for a single token
                events.append(_Event(job, index, Part([], "", [], handle.finish_reason)))
        return events

    def _tell(self, events: list[_Event]) -> None:
        if events:
            self._on_loop(self._receive, events)

    def _on_loop(self, call: Callable, *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop has ended, and with it whoever would listen
            self._closing = True

    def _restart(self) -> None:
        """Ends every job and makes a new engine; tries again until one works."""
        self.healthy, self._engine = False, None
        pause = FIRST_PAUSE
        while not self._closing:
            self._fail_all()
            try:
                engine = self._make_engine()
                engine.submit(_PROBE).result()
            except Exception as again:
                logger.error("the engine of %s could not be restarted: %s", self.name, again)
                with self._wake:
                    self._wake.wait_for(lambda: self._closing, pause)
                pause = min(2 * pause, LAST_PAUSE)
                continue
            self._engine, self.healthy = engine, True
            self.restarts += 1
            logger.warning("the engine of %s works again", self.name)
            return

    def _fail_all(self) -> None:
        with self._wake:
            jobs = [job for job, _ in self._live.values()] + [job for _, job in self._commands]
            self._live.clear()
            self._commands.clear()
        failed = unavailable("the engine failed while it ran this request; try again", "engine_failed")
        self._tell([_Event(job, 0, failed) for job in dict.fromkeys(jobs)])
