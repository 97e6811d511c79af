"""How far an evaluation is, on standard error: a bar on a terminal, elsewhere a plain line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from polygpt.evaluation.scoring import ProgressCallback

# Seconds between two plain lines.
PLAIN_INTERVAL = 5.0


@contextmanager
def progress_bar(name: str, unit: str, console: Console | None = None) -> Iterator[ProgressCallback]:
    """A callback that shows the progress of the task `name`, counted in `unit` (`questions`, say)."""
    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield _lines(name, unit, console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit + " ·"))
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(name: str, unit: str, console: Console) -> ProgressCallback:
    begun = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_INTERVAL or not done:
            return
        last = now
        left = (now - begun) / done * (total - done)
        console.print(f"{name}: {done:,} of {total:,} {unit}, {left:.0f} s left")

    return report
