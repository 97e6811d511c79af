"""Metrics of training steps on their way from the device to the listeners."""

from __future__ import annotations

import math
import time
from collections import deque

import jax
import numpy as np

from polygpt.checkpoint import NotFiniteError
from polygpt.training.events import Listener, Stepped
from polygpt.training.step import Metrics


class Meter:
    """Keeps metrics on the device and fetches several steps' together, so that no step waits for the one before."""

    def __init__(self, emit: Listener, tokens_per_step: int):
        self.emit, self.tokens_per_step = emit, tokens_per_step
        self.pending: list[tuple[int, Metrics]] = []
        self.recent: deque[float] = deque(maxlen=20)
        self.speeds: list[float] = []
        self.clock = time.perf_counter()

    def restart(self) -> None:
        """Restarts the clock, after work that was not training."""
        self.clock = time.perf_counter()

    def add(self, step: int, metrics: Metrics) -> None:
        """Adds the metrics of a step, which may still be running."""
        self.pending.append((step, metrics))

    def flush(self) -> None:
        """Fetches what is pending and emits it.

        Raises:
            NotFiniteError: a loss or gradient is not a finite number.
        """
        if not self.pending:
            return
        fetched = [(step, jax.device_get(metrics)) for step, metrics in self.pending]
        speed = len(fetched) * self.tokens_per_step / (time.perf_counter() - self.clock)
        self.speeds.append(speed)
        self.pending = []
        for step, metrics in fetched:
            values = {name: float(getattr(metrics, name)) for name in ("loss", "grad_norm", "learning_rate")}
            if not all(map(math.isfinite, values.values())):
                raise NotFiniteError(f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}")
            self.recent.append(values["loss"])
            extra = {name: float(value) for name, value in metrics.extra.items()}
            timed = speed if step == fetched[-1][0] else None
            self.emit(Stepped(step, **values, tokens_per_second=timed, extra=extra))
        self.restart()

    @property
    def recent_loss(self) -> float:
        """Mean loss of the last (up to 20) steps, in nats per token; a single batch's loss is too noisy."""
        return sum(self.recent) / len(self.recent) if self.recent else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Median over groups of steps, so that one pause does not count."""
        return float(np.median(self.speeds)) if self.speeds else 0.0
