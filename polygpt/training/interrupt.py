"""SIGINT and SIGTERM as a flag that the loop checks between steps, so that it can save before it stops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from polygpt.errors import PolygptError
from polygpt.process import command_line


class Interrupted(PolygptError):
    """The run was interrupted by a signal.

    Attributes:
        exit_code: 130 after SIGINT, 143 after SIGTERM.
    """

    def __init__(self, step: int, folder: Path, number: int = signal.SIGINT, unsaved: str | None = None):
        """After `step`, which is saved unless `unsaved` says why it could not be."""
        self.exit_code = 128 + number
        state = "which is saved" if unsaved is None else f"which is not saved: {unsaved}"
        state = "before the first step was saved" if step == 0 else f"after step {step}, {state}"
        command = command_line("train", "--resume", "--out", folder)
        super().__init__(f"interrupted {state}; go on with: {command}")


class Stop(BaseException):
    """Raised by the first signal within `InterruptFlag.at_once`."""


class InterruptFlag:
    """A context in which the first SIGINT or SIGTERM only sets `raised`; a second SIGINT interrupts at once.

    Outside the main thread, where Python allows no signal handlers, it does nothing.

    Attributes:
        raised: a signal has come.
        number: which; SIGINT until one has come.
    """

    raised = False
    number = signal.SIGINT
    _immediate = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A context, around work that changes nothing, which the first signal ends.

        Raises:
            Stop: a signal comes, or has come before.
        """
        if self.raised:
            raise Stop
        self._immediate = True
        try:
            yield
        finally:
            self._immediate = False

    def __enter__(self) -> InterruptFlag:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.raised and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.raised = not self.raised, True
        if first:
            self.number = number
        if first and self._immediate:
            raise Stop
        if first:  # by a system call: a signal may interrupt another write to the stream
            os.write(2, b"\nstopping: this step is finished and saved first; Ctrl-C again stops at once\n")
