"""The step after which all processes stop when one of them receives a signal.

Processes run ahead of their devices, each as far as it likes, so none may simply stop where it is: another may have
started a step that needs it. When one receives a signal, the watching thread of each publishes how many steps its
process has started, and from then on the process waits before it starts another one until all have done so. All then
go on to the largest of these numbers plus one. As the threads publish, nobody waits for a process that is itself
waiting for a device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from polygpt.distributed.processes import client, is_main, next_key, process_count, process_index
from polygpt.distributed.watch import failed, hooked


class StopAgreement:
    """Decides, for a loop that calls `reached` after every step, after which step all processes stop.

    Attributes:
        number: the signal for which they stop; None until one has come.
    """

    def __init__(self, received: Callable[[], int | None], forward: Callable[[int], None]):
        """An agreement between all processes, each of which makes one at the same point.

        Args:
            received: the signal that this process has received, if any.
            forward: called with the signal that another process has received.
        """
        self.received, self.forward = received, forward
        self.number: int | None = None
        self._key = next_key("stop")
        self._lock, self._decided = threading.Lock(), threading.Event()
        self._step, self._published, self._last = 0, False, 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Listens meanwhile."""
        with hooked(self._look):
            yield

    def reached(self, step: int) -> bool:
        """Whether all processes stop after `step`, which this one has started. May wait for the others to decide.

        Raises:
            ProcessFailedError: another process has failed meanwhile.
        """
        with self._lock:
            if not self._published:
                self._step = step
                return False
        while not self._decided.wait(0.2):
            if (error := failed()) is not None:
                raise error
        return step >= self._last

    def _look(self) -> None:
        """Called by the watching thread every now and then."""
        if self._decided.is_set():
            return
        if self.number is None:
            self._ask()
        if self.number is not None:
            with self._lock:
                if not self._published:
                    client().key_value_set(f"{self._key}/at/{process_index()}", str(self._step))
                    self._published = True
            self._decide()

    def _ask(self) -> None:
        own = self.received()
        if own is not None:
            with suppress(Exception):  # another process was first
                client().key_value_set(f"{self._key}/signal", str(int(own)))
        with suppress(Exception):  # nobody has received one
            self.number = int(client().key_value_try_get(f"{self._key}/signal"))
            if own is None:
                self.forward(self.number)

    def _decide(self) -> None:
        if is_main():
            steps = [int(step) for _, step in client().key_value_dir_get(f"{self._key}/at/")]
            if len(steps) < process_count():
                return
            client().key_value_set(f"{self._key}/last", str(max(steps) + 1))
        with suppress(Exception):  # process 0 has not decided yet
            self._last = int(client().key_value_try_get(f"{self._key}/last"))
            self._decided.set()
