"""Listeners of a run's events: the progress display, and the files that a run leaves."""

from __future__ import annotations

from polygpt.training.events import Listener, Note
from polygpt.training.listeners.comparison import compare_runs
from polygpt.training.listeners.files import RunFiles
from polygpt.training.listeners.progress import progress_listener
from polygpt.training.listeners.report import Baseline, write_report
from polygpt.training.listeners.trackers import Trackers


def standard_listeners(quiet: bool = False) -> list[Listener]:
    """The listeners of `polygpt train`: trackers, the run's files and report and, unless `quiet`, the progress bar."""
    shown = [] if quiet else [progress_listener()]

    def warn(note: Note) -> None:
        for listener in shown:
            listener(note)

    return [Trackers(warn), RunFiles(), *shown]


__all__ = [
    "Baseline",
    "RunFiles",
    "Trackers",
    "compare_runs",
    "progress_listener",
    "standard_listeners",
    "write_report",
]
