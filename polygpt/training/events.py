"""What happens in a run, as a stream of typed events for listeners: the progress bar, the files, the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polygpt.training.config import RunConfig


@dataclass(frozen=True)
class Note:
    """A message: what is being prepared, what was chosen, a warning."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Started:
    """Training is about to begin after `step` steps (0 unless the run is resumed).

    `held_out` is the first 12 digits of the fingerprint of the held-out tokens.
    """

    config: RunConfig
    folder: Path
    step: int
    num_parameters: int
    facts: dict[str, Any]
    held_out: str = ""


@dataclass(frozen=True)
class Compiled:
    """The step is compiled; the first one is about to run."""

    seconds: float


@dataclass(frozen=True)
class Stepped:
    """Metrics of one finished step.

    Attributes:
        tokens_per_second: over the last group of steps, compilation excluded; None within a group.
        update_ratio: norm of the update by the norm of the parameters.
        loss_scale: of float16, in this step.
        flops_utilization: share of the device's peak FLOP/s, from 0 to 1; given where `tokens_per_second` is.
        memory_bytes: peak of the device where its runtime reports it, otherwise of the process; given likewise.
        extra: auxiliary losses (weighted, not part of `loss`) and metrics of the model's parts, by name.
        expert_load: the share of the batch's choices that each expert received, by layer; given where
            `tokens_per_second` is, if there are experts.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float | None = None
    update_ratio: float | None = None
    loss_scale: float | None = None
    flops_utilization: float | None = None
    memory_bytes: int | None = None
    extra: dict[str, float] = field(default_factory=dict)
    expert_load: dict[int, list[float]] | None = None


@dataclass(frozen=True)
class Skipped:
    """A step changed nothing, because its loss, its gradient or the updated weights were not finite.

    Attributes:
        in_a_row: how many steps in a row have been skipped, this one included.
        loss_scale: of float16, in this step; the next one is half of it.
    """

    step: int
    loss: float
    grad_norm: float
    in_a_row: int
    loss_scale: float | None = None

    @property
    def reason(self) -> str:
        """What was not finite, in words."""
        found = f"loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}"
        finite = math.isfinite(self.loss) and math.isfinite(self.grad_norm)
        return f"{found}, updated weights not finite" if finite else found


@dataclass(frozen=True)
class Spiked:
    """A step's loss is a spike: above `threshold`, where `mean` is that of the steps before it."""

    step: int
    loss: float
    mean: float
    threshold: float


@dataclass(frozen=True)
class RolledBack:
    """After a spike at `step` the run went back to `to_step`; the `batches` from there to the spike are left out."""

    step: int
    to_step: int
    batches: int


@dataclass(frozen=True)
class Evaluated:
    """Mean nats per token and bits per byte on the validation windows; `full` if on all of them."""

    step: int
    val_loss: float
    val_bits_per_byte: float
    full: bool


@dataclass(frozen=True)
class Measured:
    """The metrics of one of `training.evaluations`, by name (`hellaswag/acc`)."""

    step: int
    metrics: dict[str, float | None]


@dataclass(frozen=True)
class Sampled:
    """Text that the model generated from `prompt`."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Saved:
    """A checkpoint was saved."""

    step: int
    folder: Path


@dataclass(frozen=True)
class Finished:
    """The run is complete."""

    result: RunResult


@dataclass(frozen=True)
class Ended:
    """The last event of every run, complete, interrupted or failed."""


@dataclass(frozen=True)
class RunResult:
    """The result of a run: losses in nats per token; `seconds` is the time from preparing the data to the end.

    `warning` says that the model is no better than guessing; None for any other.
    """

    run: str
    steps: int
    train_loss: float
    val_loss: float
    val_bits_per_byte: float
    tokens_per_second: float
    seconds: float
    compile_seconds: float
    warning: str | None = field(default=None, kw_only=True)


Event = (
    Note
    | Started
    | Compiled
    | Stepped
    | Skipped
    | Spiked
    | RolledBack
    | Evaluated
    | Measured
    | Sampled
    | Saved
    | Finished
    | Ended
)
Listener = Callable[[Event], None]


def emitter(listeners: Iterable[Listener]) -> Listener:
    """A function that gives an event to all listeners. One that cannot write is only warned of, once."""
    listeners, failed = tuple(listeners), set()

    def emit(event: Event) -> None:
        for index, listener in enumerate(listeners):
            try:
                listener(event)
            except OSError as error:
                if index not in failed:
                    failed.add(index)
                    reason = error.strerror or str(error)
                    emit(Note(f"{error.filename or 'a file'}: cannot be written ({reason}); the run goes on", True))

    return emit
