"""Saves snapshots in the background: training goes on while a thread writes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from polygpt.checkpoint.snapshot import Snapshot
from polygpt.checkpoint.steps import Checkpoint, Keep, save
from polygpt.errors import PolygptError


class Writer:
    """Saves one snapshot at a time below `root`; a second one waits until the first is written.

    With `background=False` each is written before `save` returns. `done` holds what became of each snapshot, in order:
    the saved step, or the error that prevented it.
    """

    def __init__(self, root: Path, background: bool = True):
        self.root, self.done = root, []
        self._pool = ThreadPoolExecutor(1, "polygpt-save") if background else None
        self._pending: Future[Checkpoint] | None = None

    def save(self, snapshot: Snapshot, keep: Keep) -> None:
        """Saves `snapshot`, whose arrays may be overwritten once this returns."""
        self.wait()
        if self._pool is None:
            self._pending = Future()
            try:
                self._pending.set_result(save(self.root, snapshot, keep))
            except PolygptError as error:
                self._pending.set_exception(error)
            self.wait()
        else:
            self._pending = self._pool.submit(save, self.root, snapshot.copied(), keep)

    def wait(self) -> None:
        """Waits until nothing is being written."""
        if self._pending is not None:
            error = self._pending.exception()
            self._take(error)

    def poll(self) -> list[Checkpoint | PolygptError]:
        """What became of the snapshots since the last call; waits for nothing."""
        if self._pending is not None and self._pending.done():
            self.wait()
        done, self.done = self.done, []
        return done

    def close(self) -> None:
        """Ends the thread, after what it is writing."""
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()

    def _take(self, error: BaseException | None) -> None:
        pending, self._pending = self._pending, None
        if error is not None and not isinstance(error, PolygptError):
            raise error
        self.done.append(pending.result() if error is None else error)
