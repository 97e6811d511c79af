"""`polygpt train --profile START:STOP`: a trace of some steps, by JAX's profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from polygpt.errors import RequestError
from polygpt.training.events import Listener, Note

PROFILE = "profile"


class Profile:
    """Traces the steps from `start` to `stop`, both included and counted from 1, into `RUN/profile`."""

    def __init__(self, start: int, stop: int):
        if not 1 <= start <= stop:
            raise RequestError(f"--profile {start}:{stop}: steps are counted from 1, and START must not exceed STOP")
        self.start, self.stop, self.running = start, stop, False

    @classmethod
    def parse(cls, text: str) -> Profile:
        """From `START:STOP`, or one step's number.

        Raises:
            RequestError: it is neither.
        """
        start, _, stop = text.partition(":")
        try:
            return cls(int(start), int(stop or start))
        except ValueError:
            raise RequestError(f"--profile {text}: not START:STOP, a range of steps such as 20:25") from None

    def check(self, steps: int, done: int = 0) -> None:
        """Refuses a range that does not lie between the steps `done` so far and the last.

        Raises:
            RequestError: it does not.
        """
        if self.stop > steps:
            raise RequestError(f"--profile {self.start}:{self.stop}: the run ends after step {steps} (training.steps)")
        if self.start <= done:
            raise RequestError(
                f"--profile {self.start}:{self.stop}: {done} steps are done already; start at {done + 1} or later"
            )

    def reach(self, step: int, folder: Path, state: Any, emit: Listener) -> None:
        """Starts or ends the trace if it is time; `step` is about to run."""
        if step == self.start and not self.running:
            jax.block_until_ready(state)  # nothing of the steps before belongs to the trace
            jax.profiler.start_trace(folder / PROFILE, create_perfetto_trace=True)
            self.running = True
        elif step > self.stop:
            self.close(folder, state, emit)

    def close(self, folder: Path, state: Any, emit: Listener) -> None:
        """Ends the trace, if it runs, and says where it is."""
        if not self.running:
            return
        self.running = False
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        traces = sorted((folder / PROFILE).rglob("perfetto_trace.json.gz"))
        where = traces[-1] if traces else folder / PROFILE
        emit(Note(f"profile: open {where} at ui.perfetto.dev, or: pip install xprof && xprof {folder / PROFILE}"))
