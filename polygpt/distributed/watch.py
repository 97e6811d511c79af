"""Watching the other processes while this one computes, so that none waits forever for one that is gone.

On CPUs a collective fails as soon as one process ends; elsewhere it may hang. A thread exchanges signs of life through
the coordinator and reads what failing processes announce. If one has failed, or has been silent for
POLYGPT_HEARTBEAT_SECONDS, and this process has not ended by itself a few seconds later, the thread ends it. If the
coordinator itself is silent, JAX ends the process after twice as long and 15 s.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from polygpt.distributed.launch import HEARTBEAT_SECONDS, HEARTBEAT_SETTING, seconds
from polygpt.distributed.processes import (
    LEFT,
    PREFIX,
    ProcessFailedError,
    announce_failure,
    client,
    coordinator,
    failures,
    is_main,
    process_count,
    process_index,
)

ALIVE, DONE = f"{PREFIX}/alive/", "done"
# Seconds between two looks; and seconds that a process has to end by itself after another one failed.
INTERVAL, GRACE = 0.5, 5.0


class Watch:
    """The thread that watches; `hooks` are further functions that it calls at every look."""

    def __init__(self, limit: float):
        self.limit, self.hooks = limit, []
        self.ended = threading.Event()
        self.heard: dict[str, tuple[str, float]] = {}
        self.error: ProcessFailedError | None = None
        self._thread = threading.Thread(target=self._run, name="polygpt-watch", daemon=True)

    def start(self) -> None:
        """Starts watching."""
        self._thread.start()

    def stop(self) -> None:
        """Stops watching, and waits until the thread is done."""
        self.ended.set()
        self._thread.join(timeout=5)
        with suppress(Exception):  # so that the others do not take the silence for a failure
            client().key_value_set(f"{ALIVE}{process_index()}", DONE, allow_overwrite=True)

    def _run(self) -> None:
        beat, since, looked = 0, None, time.monotonic()
        while not self.ended.wait(INTERVAL):
            beat, before, looked = beat + 1, looked, time.monotonic()
            if looked - before > self.limit / 2:  # this process was stopped, or its machine asleep: it heard nobody
                self.heard.clear()
            try:
                client().key_value_set(f"{ALIVE}{process_index()}", str(beat), allow_overwrite=True)
                others = {index: error for index, error in failures().items() if index != process_index()}
                if others:
                    self.error = others[min(others)]
                elif is_main():  # the others watch process 0 by asking it
                    self._listen()
                for hook in list(self.hooks):
                    hook()
            except Exception as error:
                if self.ended.is_set():
                    return
                text = str(error).partition("\n")[0][:200]
                self.error = self.error or ProcessFailedError(f"process 0, {_where()}, cannot be reached ({text})")
            if self.error is not None:
                since = since or time.monotonic()
                if time.monotonic() - since > GRACE:
                    self._end()

    def _listen(self) -> None:
        """Notes which processes have given a sign of life, and announces one that has been silent for too long."""
        now = time.monotonic()
        for key, beat in client().key_value_dir_get(ALIVE):
            if self.heard.get(key, ("", 0.0))[0] != beat:
                self.heard[key] = (beat, now)
        for key, (beat, last) in self.heard.items():
            if beat != DONE and now - last > self.limit:
                index = key.rpartition("/")[2]
                gone = f"process {index} of {process_count()} has given no sign of life for {self.limit:.0f} s"
                self.error = ProcessFailedError(gone)
                announce_failure(RuntimeError(gone))

    def _end(self) -> None:
        with suppress(Exception):
            client().key_value_set(f"{LEFT}{process_index()}", "1", allow_overwrite=True)
        if not self.ended.is_set():
            os.write(2, f"\npolygpt: {self.error}\n".encode())
            sys.stdout.flush()
            os._exit(self.error.exit_code)


def _where() -> str:
    return f"the coordinator {coordinator()}"


_current: list[Watch] = []


@contextmanager
def watching() -> Iterator[None]:
    """Watches the other processes meanwhile, and tells them if this one fails."""
    if process_count() == 1:
        yield
        return
    watch = Watch(seconds(HEARTBEAT_SETTING, HEARTBEAT_SECONDS))
    _current.append(watch)
    watch.start()
    try:
        yield
    except BaseException as error:
        announce_failure(error)
        raise
    finally:
        _current.remove(watch)
        watch.stop()


@contextmanager
def hooked(hook: Callable[[], None]) -> Iterator[None]:
    """Has the watching thread call `hook` on every check within the context."""
    for watch in _current:
        watch.hooks.append(hook)
    try:
        yield
    finally:
        for watch in _current:
            watch.hooks.remove(hook)


def failed() -> ProcessFailedError | None:
    """The error of another process, if one has failed."""
    return next((watch.error for watch in _current if watch.error is not None), None)


@contextmanager
def collective_errors() -> Iterator[None]:
    """Explains an error of JAX's runtime that comes of another process's end.

    Raises:
        ProcessFailedError: names the process, if it is known which one failed.
    """
    try:
        yield
    except Exception as error:
        if process_count() == 1 or not _is_collective(error):
            raise
        end = time.monotonic() + GRACE  # the others may still be announcing what happened
        while failed() is None and time.monotonic() < end:
            time.sleep(0.05)
        text = str(error).partition("\n")[0][:200]
        raise failed() or ProcessFailedError(
            f"another process of {process_count()} has ended ({text}); its own output says why"
        ) from error


def _is_collective(error: Exception) -> bool:
    words = ("gloo", "collective", "connection", "nccl", "unavailable", "aborted", "coordination")
    return type(error).__module__.startswith(("jax", "builtins")) and any(w in str(error).lower() for w in words)
