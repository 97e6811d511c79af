"""Which process this is, and what it tells the others through the coordinator's key-value store."""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import time
from contextlib import suppress
from typing import Any

from polygpt.errors import PolygptError

PREFIX = "polygpt"
FAILED, LEFT = f"{PREFIX}/failed/", f"{PREFIX}/left/"
# Seconds that the process of the coordinator waits for the others to leave first: they lose it when it ends.
LINGER = 10.0
_turns = itertools.count()


class ProcessFailedError(PolygptError):
    """Another process of this run has failed; the message says which, and why.

    Attributes:
        exit_code: that of the other process.
    """

    def __init__(self, message: str, exit_code: int = 1):
        self.exit_code = exit_code
        super().__init__(message)


def _state() -> Any:
    """JAX's own record of the processes. It has no public interface to the coordinator's key-value store."""
    from jax._src import distributed

    return distributed.global_state


def started() -> bool:
    """Whether this process has joined others, without importing JAX to find out."""
    return "jax" in sys.modules and _state().client is not None


def process_count() -> int:
    """How many processes train together; 1 unless they were started as several."""
    return _state().num_processes if started() else 1


def process_index() -> int:
    """The number of this process, from 0."""
    return _state().process_id if started() else 0


def is_main() -> bool:
    """Whether this is the process that writes logs, reports and configurations: number 0."""
    return process_index() == 0


def client() -> Any:
    """The connection to the coordinator."""
    return _state().client


def coordinator() -> str:
    """The coordinator's address."""
    return str(_state().coordinator_address)


def next_key(name: str) -> str:
    """A key that no other use has. All processes come to the same one, since they ask in the same order."""
    return f"{PREFIX}/{name}/{next(_turns)}"


def failures() -> dict[int, ProcessFailedError]:
    """The processes that have said that they failed, and their errors."""
    found = {}
    for key, text in client().key_value_dir_get(FAILED):
        said = json.loads(text)
        index = int(key.rpartition("/")[2])
        where = f"process {index} of {process_count()} ({said['host']})"
        found[index] = ProcessFailedError(f"{where} stopped: {said['message']}", said["code"])
    return found


def check_others() -> None:
    """Raises the error of a process that has failed.

    Raises:
        ProcessFailedError: there is one.
    """
    for index, error in failures().items():
        if index != process_index():
            raise error


def announce_failure(error: BaseException) -> None:
    """Tells the other processes that this one is about to end, and why."""
    if process_count() == 1:
        return
    message = str(error) or ("interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__)
    number = int(getattr(error, "number", 2))  # KeyboardInterrupt: the signal's
    code = 128 + number if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    said = {"message": message, "code": code, "host": socket.gethostname()}
    with suppress(Exception):  # the coordinator may be gone; an announcement is made once
        client().key_value_set(f"{FAILED}{process_index()}", json.dumps(said))


def leave(code: int) -> None:
    """Ends this process's part, at the end of the program: with code 0 once all are done, otherwise at once.

    After a failure the process exits here. Shutting down in order would wait for processes that do not come.
    """
    if process_count() == 1:
        return
    if code == 0:
        import jax

        with suppress(Exception):  # another one failed after this one was done
            jax.distributed.shutdown()
        return
    with suppress(Exception):
        _say_goodbye()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say_goodbye() -> None:
    client().key_value_set(f"{LEFT}{process_index()}", "1", allow_overwrite=True)
    end = time.monotonic() + LINGER
    while is_main() and time.monotonic() < end and len(client().key_value_dir_get(LEFT)) < process_count():
        time.sleep(0.05)
