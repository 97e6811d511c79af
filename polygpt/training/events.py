"""What happens in a run, as one stream of typed events; the progress bar, the files and the report listen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polygpt.training.config import RunConfig


@dataclass(frozen=True)
class Note:
    """Something worth a line: what is being prepared, a warning, what implementation runs."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Started:
    """Training begins at `step` (0, or where a resumed run goes on)."""

    config: RunConfig
    folder: Path
    step: int
    num_parameters: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Stepped:
    """Metrics of one finished step; `tokens_per_second` is of the last group of steps, compilation excluded.

    `extra` has the auxiliary losses (weighted, not part of `loss`) and metrics of the model's parts, by name.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float | None = None
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """Mean nats a token and bits a byte on validation windows after `step` steps; `full` if on all of them."""

    step: int
    val_loss: float
    val_bits_per_byte: float
    full: bool


@dataclass(frozen=True)
class Measured:
    """What one of `training.evaluations` found after `step` steps; `metrics` by name, as in `hellaswag/acc`."""

    step: int
    metrics: dict[str, float | None]


@dataclass(frozen=True)
class Sampled:
    """Text the model wrote after `step` steps."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Saved:
    """A verified checkpoint after `step` steps."""

    step: int
    folder: Path


@dataclass(frozen=True)
class Finished:
    """The run is complete."""

    result: RunResult


@dataclass(frozen=True)
class Ended:
    """The last event of all, whether the run is complete, was interrupted or failed."""


@dataclass(frozen=True)
class RunResult:
    """What a run comes to. Losses in nats a token; `seconds` is all of it, from preparing the data to the end."""

    run: str
    steps: int
    train_loss: float
    val_loss: float
    val_bits_per_byte: float
    tokens_per_second: float
    seconds: float
    compile_seconds: float


Event = Note | Started | Stepped | Evaluated | Measured | Sampled | Saved | Finished | Ended
Listener = Callable[[Event], None]
