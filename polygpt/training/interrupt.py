"""SIGINT and SIGTERM as a flag that the loop checks between steps, so that it can save before it stops."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType

from polygpt.errors import PolygptError
from polygpt.process import command_line


class Interrupted(PolygptError):
    """The run was interrupted, after saving a checkpoint."""

    exit_code = 130

    def __init__(self, step: int, folder: Path):
        command = command_line("train", "--resume", "--out", folder)
        super().__init__(f"interrupted after step {step}, which is saved; go on with: {command}")


class InterruptFlag:
    """A context in which the first SIGINT or SIGTERM only sets `raised`; a second SIGINT interrupts at once.

    Outside the main thread, where Python allows no signal handlers, it does nothing.
    """

    raised = False

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
        if not self.raised:  # by a system call: a signal may interrupt another write to the stream
            os.write(2, b"\nstopping: this step is finished and saved first; Ctrl-C again stops at once\n")
        self.raised = True
