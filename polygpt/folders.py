"""Folders of runs, as far as they can be judged without importing JAX."""

from __future__ import annotations

from pathlib import Path

from polygpt.errors import RequestError
from polygpt.files import check_checkpoint_path
from polygpt.process import command_line

CONFIG = "config.yaml"  # of a run's or a model's folder


def check_run(folder: Path) -> None:
    """Refuses a folder without a run.

    Raises:
        RequestError: there is no run in it.
    """
    if not (folder / CONFIG).is_file():
        new = folder.with_name(f"{folder.name}-run") if folder.exists() else folder
        start = command_line("train", "RECIPE", "--out", new)
        raise RequestError(f"{folder}: no run here (it has no {CONFIG}); start one with: {start}")


def check_new_run(folder: Path) -> None:
    """Refuses a folder in which no run can be started.

    Raises:
        RequestError: it exists already, or no checkpoint could be written there.
    """
    if folder.exists():
        if (folder / CONFIG).is_file():
            raise RequestError(f"{folder}: exists already; continue it with --resume, or choose another --out")
        raise RequestError(f"{folder}: exists and is no run; choose another --out")
    check_checkpoint_path(folder)
