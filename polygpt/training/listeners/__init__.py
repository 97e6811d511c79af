"""Listeners of a run's events: the progress display, and the files that a run leaves."""

from __future__ import annotations

from polygpt.training.events import Listener
from polygpt.training.listeners.files import RunFiles
from polygpt.training.listeners.progress import progress_listener
from polygpt.training.listeners.report import Baseline, write_report


def standard_listeners(quiet: bool = False) -> list[Listener]:
    """The listeners of `polygpt train`: the run's files and report and, unless `quiet`, the progress bar."""
    return [RunFiles()] if quiet else [RunFiles(), progress_listener()]


__all__ = ["Baseline", "RunFiles", "progress_listener", "standard_listeners", "write_report"]
