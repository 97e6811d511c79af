"""`metrics.jsonl` and `samples.jsonl`: one JSON object per line, cut back to the checkpoint when a run resumes."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import suppress
from typing import Any

from polygpt.files import write_text
from polygpt.loading import RESULT
from polygpt.training.events import Evaluated, Event, Finished, Measured, Sampled, Started, Stepped
from polygpt.training.listeners.report import write_report
from polygpt.training.run_folder import METRICS, SAMPLES, read_lines, read_metrics


class RunFiles:
    """Writes the run's metrics and samples and, at the end, its result and report.

    Each line of the metrics says what it is: `event` is `step`, `validation` or `evaluation`. Lines that could not be
    written (on a full disk) are written with the next one that can.
    """

    def __init__(self) -> None:
        self.unwritten: dict[str, str] = {}

    def __call__(self, event: Event) -> None:
        match event:
            case Started(folder=folder, step=step):
                self.folder = folder
                metrics = [line for line in read_metrics(folder) if line["step"] <= step]
                samples = [line for line in read_lines(folder / SAMPLES) if line["step"] <= step]
                for name, lines in ((METRICS, metrics), (SAMPLES, samples)):
                    if (folder / name).is_file():  # lines after the checkpoint will be written again
                        write_text(folder / name, "".join(map(_to_json, lines)))
                self.evaluated = [line for line in metrics if line["event"] != "step"]
            case Stepped():
                line = {k: v for k, v in dataclasses.asdict(event).items() if v is not None and k != "extra"}
                self._write(
                    METRICS, {"event": "step", **line, **{k: v for k, v in event.extra.items() if k not in line}}
                )
            case Evaluated():
                self._write_once({"event": "validation", **dataclasses.asdict(event)})
            case Measured(step=step, metrics=metrics):
                self._write_once({"event": "evaluation", "step": step, **metrics})
            case Sampled():
                self._write(SAMPLES, dataclasses.asdict(event))
            case Finished(result=result):
                text = json.dumps(dataclasses.asdict(result), indent=1) + "\n"
                (self.folder / RESULT).write_text(text, encoding="utf-8")
                write_report(self.folder)

    def _write_once(self, line: dict[str, Any]) -> None:
        """Adds an evaluation, unless it is one that a finished run already has and repeats on resuming."""
        if line not in self.evaluated:
            self._write(METRICS, line)

    def _write(self, name: str, line: dict[str, Any]) -> None:
        path, text = self.folder / name, self.unwritten.pop(name, "") + _to_json(line)
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


def _to_json(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"
