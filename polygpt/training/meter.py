"""Metrics of training steps on their way from the device to the listeners."""

from __future__ import annotations

import math
import time
from collections import deque

import jax
import numpy as np

from polygpt.checkpoint import NotFiniteError
from polygpt.training.devices import Utilization, peak_memory
from polygpt.training.events import Listener, Skipped, Spiked, Stepped
from polygpt.training.state import Metrics


class Meter:
    """Keeps metrics on the device and fetches several steps' together, so that no step waits for the one before."""

    def __init__(
        self, emit: Listener, tokens_per_step: int, roll_back: bool = False, utilization: Utilization | None = None
    ):
        self.emit, self.tokens_per_step, self.roll_back = emit, tokens_per_step, roll_back
        self.utilization = utilization
        self.pending: list[tuple[int, Metrics]] = []
        self.recent: deque[float] = deque(maxlen=20)
        self.speeds: list[float] = []
        self.clock = time.perf_counter()
        self.finite_loss = True  # the last step's

    def restart(self) -> None:
        """Restarts the clock, after work that was not training."""
        self.clock = time.perf_counter()

    def add(self, step: int, metrics: Metrics) -> None:
        """Adds the metrics of a step, which may still be running."""
        self.pending.append((step, metrics))

    def flush(self) -> int | None:
        """Fetches what is pending and emits it.

        Returns:
            With `roll_back`, the first step whose loss is a spike; later steps are dropped, as if they had never been.

        Raises:
            NotFiniteError: so many steps in a row were skipped that the run must stop.
        """
        if not self.pending:
            return None
        fetched = jax.device_get(self.pending)
        speed = len(fetched) * self.tokens_per_step / (time.perf_counter() - self.clock)
        self.speeds.append(speed)
        self.pending = []
        updated = [step for step, metrics in fetched if not metrics.skipped]
        for step, metrics in fetched:
            self._emit_step(step, metrics, speed if updated[-1:] == [step] else None)
            if metrics.spike and self.roll_back:
                return step
        self.restart()
        return None

    def _emit_step(self, step: int, metrics: Metrics, speed: float | None) -> None:
        loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
        scale = None if metrics.loss_scale is None else float(metrics.loss_scale)
        self.finite_loss = math.isfinite(loss)
        if metrics.skipped:
            skipped = Skipped(step, loss, grad_norm, int(metrics.in_a_row), scale)
            self.emit(skipped)
            if metrics.stopped:
                many = f"{metrics.in_a_row} steps" if metrics.in_a_row > 1 else "a step"
                raise NotFiniteError(f"step {step}: {skipped.reason}; {many} in a row skipped")
            return
        self.recent.append(loss)
        extra = {name: float(value) for name, value in metrics.extra.items()}
        rate, ratio = float(metrics.learning_rate), float(metrics.update_ratio)
        used, held, load = None, None, None
        if speed is not None:
            used, held = self.utilization(speed) if self.utilization else None, peak_memory()
            load = {layer: shares.round(4).tolist() for layer, shares in (metrics.expert_load or {}).items()} or None
        self.emit(Stepped(step, loss, grad_norm, rate, speed, ratio, scale, used, held, extra, load))
        if metrics.spike:
            self.emit(Spiked(step, loss, float(metrics.spike_mean), float(metrics.spike_limit)))

    @property
    def recent_loss(self) -> float:
        """Mean loss of the last (up to 20) steps, in nats per token; a single batch's loss is too noisy."""
        return sum(self.recent) / len(self.recent) if self.recent else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Median over groups of steps, so that one pause does not count."""
        return float(np.median(self.speeds)) if self.speeds else 0.0
