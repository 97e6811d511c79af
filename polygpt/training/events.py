"""What happens in a run, as a stream of typed events for listeners: the progress bar, the files, the report."""

from __future__ import annotations

from collections.abc import Callable
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
        extra: auxiliary losses (weighted, not part of `loss`) and metrics of the model's parts, by name.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float | None = None
    extra: dict[str, float] = field(default_factory=dict)


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
    """The result of a run: losses in nats per token; `seconds` is the time from preparing the data to the end."""

    run: str
    steps: int
    train_loss: float
    val_loss: float
    val_bits_per_byte: float
    tokens_per_second: float
    seconds: float
    compile_seconds: float


Event = Note | Started | Compiled | Stepped | Evaluated | Measured | Sampled | Saved | Finished | Ended
Listener = Callable[[Event], None]
