"""`metrics.jsonl` and `samples.jsonl`: one JSON object a line, cut back to the checkpoint when a run goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from polygpt.errors import PolygptError
from polygpt.training.events import Evaluated, Event, Finished, Sampled, Saved, Started, Stepped
from polygpt.training.listeners.report import write_report
from polygpt.training.run_folder import METRICS, RESULT, SAMPLES, read_lines


class RunFiles:
    """Writes the run's line files; lines of a step go to the disk together with the next checkpoint or evaluation."""

    def __call__(self, event: Event) -> None:
        try:
            self._handle(event)
        except OSError as error:
            raise PolygptError(
                f"{self.folder}: cannot be written ({error.strerror}); checkpoints are intact"
            ) from error

    def _handle(self, event: Event) -> None:
        match event:
            case Started(folder=folder, step=step):
                self.folder = folder
                for name in (METRICS, SAMPLES):
                    _cut_after(folder / name, step)
            case Stepped():
                self._write(METRICS, {k: v for k, v in dataclasses.asdict(event).items() if v is not None})
            case Evaluated():
                self._write(METRICS, dataclasses.asdict(event))
            case Sampled():
                self._write(SAMPLES, dataclasses.asdict(event))
            case Finished(result=result):
                text = json.dumps(dataclasses.asdict(result), indent=1) + "\n"
                (self.folder / RESULT).write_text(text, encoding="utf-8")
                write_report(self.folder)
            case Saved():
                pass

    def _write(self, name: str, line: dict[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _cut_after(path: Path, step: int) -> None:
    """Leaves the lines up to `step`: what came after the checkpoint will come again."""
    if not path.is_file():
        return
    kept = [line for line in read_lines(path) if line["step"] <= step]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), encoding="utf-8")
    partial.replace(path)
