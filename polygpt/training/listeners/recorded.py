"""A run as its folder records it, complete or not: what reports are made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polygpt.errors import RequestError
from polygpt.loading import RESULT
from polygpt.training.config import RunConfig
from polygpt.training.run_folder import METRICS, read_config, read_metrics


@dataclass(frozen=True)
class Recorded:
    """A run's configuration and metrics.

    Attributes:
        lines: of the metrics, those of steps that were rolled back left out.
        abandoned: steps that were rolled back.
        finished: whether the run has its result, which an earlier end of a run that goes on does not count as.
    """

    folder: Path
    config: RunConfig
    lines: list[dict[str, Any]]
    abandoned: list[dict[str, Any]]
    result: dict[str, Any]
    finished: bool

    @classmethod
    def read(cls, folder: Path) -> Recorded:
        """The run in `folder`.

        Raises:
            RequestError: there is no run, or it has no metrics yet.
        """
        config = read_config(folder)
        lines, abandoned = _settled(read_metrics(folder))
        if not any(line["event"] == "step" for line in lines):
            raise RequestError(f"{folder}: no steps are recorded in its {METRICS} yet, so there is nothing to show")
        result = _result(lines)
        saved = json.loads((folder / RESULT).read_text(encoding="utf-8")) if (folder / RESULT).is_file() else {}
        finished = saved.get("steps") == result["steps"] and result["steps"] >= config.training.steps
        return cls(folder, config, lines, abandoned, (saved if finished else result), finished)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def tokens_per_step(self) -> int:
        """How many tokens a step sees."""
        return self.config.training.batch_size * self.config.model.context_length

    def of(self, *events: str) -> list[dict[str, Any]]:
        """The lines of some events."""
        return [line for line in self.lines if line["event"] in events]


def _settled(lines: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines that count, and those of steps that the run went back from."""
    kept: list[dict[str, Any]] = []
    abandoned: list[dict[str, Any]] = []
    for line in lines:
        if line["event"] == "rolled_back":
            undone = [row for row in kept if row["step"] > line["to_step"] and row["event"] in ("step", "validation")]
            abandoned += [row for row in undone if row["event"] == "step"]
            kept = [row for row in kept if row not in undone]
        kept.append(line)
    return kept, abandoned


def _result(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run that has not finished."""
    steps = [line for line in lines if line["event"] == "step"]
    last = next((line for line in reversed(lines) if line["event"] == "validation"), {})
    speeds = [line["tokens_per_second"] for line in steps if "tokens_per_second" in line]
    return {
        "steps": steps[-1]["step"],
        "train_loss": float(np.mean([line["loss"] for line in steps[-20:]])),
        "val_loss": last.get("val_loss"),
        "val_bits_per_byte": last.get("val_bits_per_byte"),
        "tokens_per_second": float(np.median(speeds)) if speeds else None,
        "seconds": None,
        "compile_seconds": None,
    }
