"""Trackers of `training.trackers`: TensorBoard, Weights & Biases, trackio. One that fails never stops the run."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from polygpt.errors import RequestError
from polygpt.files import write_text
from polygpt.training.events import (
    Ended,
    Evaluated,
    Event,
    Finished,
    Measured,
    Note,
    RolledBack,
    Sampled,
    Skipped,
    Spiked,
    Started,
    Stepped,
)
from polygpt.training.run_folder import read_metrics

TENSORBOARD, IDENTITY = "tensorboard", "trackers.json"
PROJECT = "polygpt"
# Seconds between two writes of TensorBoard's events to the disk.
FLUSH_INTERVAL = 5.0


class Tracker(Protocol):
    """Where metrics are sent."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the metrics of a step."""
        ...

    def flush(self) -> None:
        """After a group of steps: makes visible what has been logged."""
        ...

    def rewind(self, step: int) -> None:
        """The run goes back to `step`: steps after it will come again."""
        ...

    def text(self, step: int, name: str, text: str) -> None:
        """Sends a text."""
        ...

    def finish(self, complete: bool) -> None:
        """The run has ended."""
        ...


class TensorBoard:
    """Event files in `RUN/tensorboard`; resuming hides the steps that will come again."""

    def __init__(self, started: Started):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.summary import text

        self.make, self.summary, self.make_text = event_pb2, summary_pb2.Summary, text
        folder = started.folder / TENSORBOARD
        folder.mkdir(exist_ok=True)
        # Not tensorboardX's SummaryWriter: it writes in a thread, and blocks for ever once that has met a full disk.
        self.writer = EventsWriter(str(folder / "events"), f".{secrets.token_hex(4)}")
        self.flushed = time.monotonic()
        if started.step:
            self.rewind(started.step)

    def _write(self, step: int, **content: Any) -> None:
        self.writer.write_event(self.make.Event(step=step, wall_time=time.time(), **content))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        parts = [self.summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step, summary=self.summary(value=parts))

    def flush(self) -> None:
        if time.monotonic() - self.flushed >= FLUSH_INTERVAL:  # it waits for the disk
            self.writer.flush()
            self.flushed = time.monotonic()

    def rewind(self, step: int) -> None:
        self._write(step + 1, session_log=self.make.SessionLog(status=self.make.SessionLog.START))

    def text(self, step: int, name: str, text: str) -> None:
        self._write(step, summary=self.make_text(name, f"```\n{text}\n```"))
        self.flush()

    def finish(self, complete: bool) -> None:
        self.writer.close()


class _Remote:
    """A tracker that cannot take back what it has been sent: steps that come again after resuming are left out.

    They are the same, bit for bit, unless settings were changed.
    """

    def __init__(self, started: Started):
        self.folder = started.folder
        # The steps logged before, since this listener comes before the one that cuts them from the file.
        logged = (line["step"] for line in read_metrics(started.folder) if line["event"] == "step")
        self.last = max(logged, default=0) if started.step else 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step > self.last:
            self.send(step, dict(values))

    def send(self, step: int, values: dict[str, float]) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def text(self, step: int, name: str, text: str) -> None:
        pass


class WandB(_Remote):
    """Weights & Biases, with its own files in `RUN/wandb`. WANDB_PROJECT, WANDB_MODE and its other variables count."""

    def __init__(self, started: Started):
        import wandb

        super().__init__(started)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=started.folder.name,
            id=_identity(started.folder),
            resume="allow",
            dir=str(started.folder),
            config=started.config.to_dict(),
            settings=wandb.Settings(console="off"),
        )

    def send(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def finish(self, complete: bool) -> None:
        self.run.finish(exit_code=0 if complete else 1)


class Trackio(_Remote):
    """trackio, in its database on this machine (TRACKIO_DIR), or where its variables say; project TRACKIO_PROJECT."""

    def __init__(self, started: Started):
        import trackio

        super().__init__(started)
        project, self.trackio = os.environ.get("TRACKIO_PROJECT", PROJECT), trackio
        with redirect_stdout(sys.stderr):  # it prints; standard output belongs to the command
            self.run = trackio.init(
                project=project,
                name=f"{started.folder.name}-{_identity(started.folder)}",
                resume="allow",
                config=started.config.to_dict(),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def send(self, step: int, values: dict[str, float]) -> None:
        self.trackio.log(values, step=step)

    def finish(self, complete: bool) -> None:
        with redirect_stdout(sys.stderr):
            self.trackio.finish()


TRACKERS: dict[str, Callable[[Started], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}
# Name -> the module it needs and what installs that.
NEEDED = {
    "tensorboard": ("tensorboardX", "tensorboardX"),
    "wandb": ("wandb", "'polygpt[wandb]'"),
    "trackio": ("trackio", "'polygpt[trackio]'"),
}


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuses a tracker that is not installed.

    Raises:
        RequestError: says what installs it.
    """
    for name in names:
        module, package = NEEDED[name]
        if find_spec(module) is None:
            raise RequestError(f"training.trackers: {module} is not installed: pip install {package}")


class Trackers:
    """Sends a run's metrics to each of `training.trackers`. Must come before the listener that writes the metrics."""

    def __init__(self, warn: Callable[[Note], None]):
        self.warn, self.open, self.complete = warn, {}, False

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            for name in dict.fromkeys(event.config.training.trackers):
                self._try(name, self._start, name, event)
        elif isinstance(event, Finished):
            self.complete = True
        elif self.open:
            for name, tracker in list(self.open.items()):
                self._try(name, self._send, tracker, event)
        if isinstance(event, Ended):
            self.open = {}

    def _start(self, name: str, event: Started) -> None:
        self.open[name] = TRACKERS[name](event)

    def _send(self, tracker: Tracker, event: Event) -> None:
        match event:
            case RolledBack(to_step=step):
                tracker.rewind(step)
            case Sampled(step=step, prompt=prompt, text=text):
                tracker.text(step, "samples", prompt + text)
            case Ended():
                tracker.finish(self.complete)
            case _ if values := values_of(event):
                tracker.log(event.step, values)
                if not (isinstance(event, Stepped) and event.tokens_per_second is None):
                    tracker.flush()

    def _try(self, name: str, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:  # a library's own, of any kind
            self.open.pop(name, None)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.warn(Note(f"{name} failed ({reason}): the run goes on without it", warning=True))


def values_of(event: Event) -> dict[str, float]:
    """The metrics of an event by the names that trackers show, grouped by what is before the slash; {} for others."""
    match event:
        case Stepped():
            fields = vars(event)
            training = ("loss", "grad_norm", "learning_rate", "update_ratio", "loss_scale")
            names = {name: f"train/{name}" for name in training}
            names |= {name: f"speed/{name}" for name in ("tokens_per_second", "flops_utilization", "memory_bytes")}
            known = {names[name]: fields[name] for name in names if fields[name] is not None}
            return known | {f"parts/{name}": value for name, value in event.extra.items()}
        case Evaluated(val_loss=loss, val_bits_per_byte=bits):
            return {"validation/loss": loss, "validation/bits_per_byte": bits}
        case Measured(metrics=metrics):
            return {name: value for name, value in metrics.items() if value is not None}
        case Skipped(in_a_row=count):
            return {"events/skipped_in_a_row": count}
        case Spiked(loss=loss):
            return {"events/spike_loss": loss}
    return {}


def _identity(folder: Path) -> str:
    """What this run is called in trackers, so that resuming goes on with the same one."""
    path = folder / IDENTITY
    if not path.is_file():
        write_text(path, json.dumps({"id": secrets.token_hex(4)}) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))["id"]
