"""`metrics.jsonl` and `samples.jsonl`: one JSON object per line, cut back to the checkpoint when a run resumes."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import suppress
from typing import Any

from polygpt.files import write_text
from polygpt.loading import RESULT
from polygpt.training.events import (
    Ended,
    Evaluated,
    Event,
    Finished,
    Measured,
    RolledBack,
    Sampled,
    Skipped,
    Spiked,
    Started,
    Stepped,
)
from polygpt.training.listeners.report import write_report
from polygpt.training.run_folder import METRICS, SAMPLES, read_lines, read_metrics

# The `event` of a line.
EVENTS = {Skipped: "skipped", Spiked: "spiked", RolledBack: "rolled_back"}


class RunFiles:
    """Writes the run's metrics and samples and, at the end, its result and report.

    Each line of the metrics says what it is: `event` is `step`, `validation`, `evaluation`, `skipped`, `spiked` or
    `rolled_back`. The lines of a group of steps, whose metrics are fetched together, are written together. Lines that
    could not be written (on a full disk) are written with the next one that can.
    """

    def __init__(self) -> None:
        self.group: list[str] = []
        self.unwritten: dict[str, str] = {}

    def __call__(self, event: Event) -> None:
        match event:
            case Started(folder=folder, step=step):
                self.folder = folder
                metrics = up_to(step, read_metrics(folder))
                samples = [line for line in read_lines(folder / SAMPLES) if line["step"] <= step]
                for name, lines in ((METRICS, metrics), (SAMPLES, samples)):
                    if (folder / name).is_file():  # lines after the checkpoint will be written again
                        write_text(folder / name, "".join(map(_to_json, lines)))
                self.evaluated = [line for line in metrics if line["event"] != "step"]
            case Stepped():
                line = {k: v for k, v in vars(event).items() if v is not None and k != "extra"}
                line = {"event": "step", **line, **{k: v for k, v in event.extra.items() if k not in line}}
                self.group.append(_to_json(line))
                if event.tokens_per_second is not None:
                    self._write_group()
            case Skipped() | Spiked() | RolledBack():
                self._write(METRICS, {"event": EVENTS[type(event)], **dataclasses.asdict(event)})
            case Ended():
                self._write_group()
            case Evaluated():
                self._write_once({"event": "validation", **dataclasses.asdict(event)})
            case Measured(step=step, metrics=metrics):
                self._write_once({"event": "evaluation", "step": step, **metrics})
            case Sampled():
                self._write(SAMPLES, dataclasses.asdict(event))
            case Finished(result=result):
                text = json.dumps(dataclasses.asdict(result), indent=1) + "\n"
                write_text(self.folder / RESULT, text)
                write_report(self.folder)

    def _write_once(self, line: dict[str, Any]) -> None:
        """Adds an evaluation, unless it is one that a finished run already has and repeats on resuming."""
        if line not in self.evaluated:
            self._write(METRICS, line)

    def _write(self, name: str, line: dict[str, Any]) -> None:
        self._write_group()
        self._append(name, _to_json(line))

    def _write_group(self) -> None:
        lines, self.group = "".join(self.group), []
        if lines:
            self._append(METRICS, lines)

    def _append(self, name: str, text: str) -> None:
        path, text = self.folder / name, self.unwritten.pop(name, "") + text
        before = path.stat().st_size if path.is_file() else None
        try:
            with path.open("a", encoding="utf-8") as stream:
                stream.write(text)
        except OSError:
            self.unwritten[name] = text
            if before is not None:
                with suppress(OSError):  # half a line would hide those after it
                    os.truncate(path, before)
            raise


def up_to(step: int, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a run that goes on after `step`: also those of steps that it had already rolled back from."""
    back = (i for i, line in enumerate(lines) if line["event"] == "rolled_back" and line["to_step"] < step)
    settled = max(back, default=-1) + 1
    return lines[:settled] + [line for line in lines[settled:] if line["step"] <= step]


def _to_json(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"
