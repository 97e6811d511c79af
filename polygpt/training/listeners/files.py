"""`metrics.jsonl` and `samples.jsonl`: one JSON object a line, cut back to the checkpoint when a run goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from polygpt.errors import PolygptError
from polygpt.files import write_text
from polygpt.loading import RESULT
from polygpt.training.events import Evaluated, Event, Finished, Measured, Sampled, Saved, Started, Stepped
from polygpt.training.listeners.report import write_report
from polygpt.training.run_folder import METRICS, SAMPLES, read_lines


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
                kept = [_cut_after(folder / name, step) for name in (METRICS, SAMPLES)]
                self.evaluated = next((line for line in reversed(kept[0]) if "val_loss" in line), None)
                self.measured = [line for line in kept[0] if "loss" not in line and "val_loss" not in line]
            case Stepped():
                line = {k: v for k, v in dataclasses.asdict(event).items() if v is not None and k != "extra"}
                self._write(METRICS, event.extra | line)
            case Evaluated():
                # A finished run that is resumed ends with the evaluation that it already has.
                if (line := dataclasses.asdict(event)) != self.evaluated:
                    self._write(METRICS, line)
            case Measured(step=step, metrics=metrics):
                if (line := {"step": step, **metrics}) not in self.measured:
                    self._write(METRICS, line)
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


def _cut_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Leaves, and gives, the lines up to `step`: what came after the checkpoint will come again."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    if path.is_file():
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
    return kept
