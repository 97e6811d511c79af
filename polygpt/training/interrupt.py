"""SIGINT and SIGTERM as a flag that the loop checks between steps, so that it can save before it stops.

Of several processes all stop after the same step, whichever of them receives the signal.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from polygpt.distributed import StopAgreement, process_count
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

    Outside the main thread, where Python allows no signal handlers, it does nothing. Of several processes, `raised` is
    set by `check`, in all of them after the same step.

    Attributes:
        raised: a signal has come.
        number: which; SIGINT until one has come.
    """

    raised = False
    number = signal.SIGINT
    _received = _immediate = False
    _agreement: StopAgreement | None = None

    def check(self, step: int) -> None:
        """Must be called after `step` is started where there are several processes; otherwise it does nothing."""
        if self._agreement is not None and self._agreement.reached(step):
            self.raised, self.number = True, self._agreement.number

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A context, around work that changes nothing, which the first signal ends.

        Raises:
            Stop: a signal comes, or has come before.
        """
        self._immediate = True
        try:
            if self.raised or self._received or (self._agreement is not None and self._agreement.number is not None):
                raise Stop
            yield
        finally:
            self._immediate = False

    def __enter__(self) -> InterruptFlag:
        self._previous, self._stack, self._left = {}, ExitStack(), threading.Event()
        if process_count() > 1:
            self._agreement = StopAgreement(lambda: self.number if self._received else None, self._forward)
            self._stack.enter_context(self._agreement.active())
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._stack.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _insist(self) -> None:
        """Interrupts again if need be: an exception that is raised within a callback or a finalizer is lost."""
        if not self._left.wait(1):
            os.kill(os.getpid(), signal.SIGINT)

    def _forward(self, number: int) -> None:
        """Another process has received a signal: work that need not be finished ends here as well."""
        if self._immediate:
            os.kill(os.getpid(), number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            if not self._left.is_set():
                threading.Thread(target=self._insist, daemon=True).start()
            raise KeyboardInterrupt
        first, self._received = not self._received, True
        if first:
            self.number = number
            self.raised = self._agreement is None
        if first and self._immediate:
            raise Stop
        if first:  # by a system call: a signal may interrupt another write to the stream
            os.write(2, b"\nstopping: this step is finished and saved first; Ctrl-C again stops at once\n")
