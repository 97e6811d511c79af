"""Learning-rate schedules: each is the peak rate times a function of the step.

Each begins with a linear warm-up, which starts at peak/warmup_steps (an update with a learning rate of 0 would be a
wasted step) and reaches the peak at step `warmup_steps`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array
from pydantic import Field, NonNegativeInt

from polygpt.config import PartConfig

StepCount = NonNegativeInt | Annotated[float, Field(gt=0, lt=1)]
"""A number of steps, or (below 1) a share of the run's."""
Share = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
DecayShape = Literal["linear", "cosine", "1-sqrt"]


def in_steps(count: int | float, steps: int) -> int:
    """A `StepCount` as a number of steps, for a run of `steps`; a share is at least one step."""
    return count if isinstance(count, int) else max(round(count * steps), 1)


class ScheduleConfig(PartConfig):
    """The slot `schedule`.

    Attributes:
        decays: whether the learning rate falls after the warm-up.
    """

    needed: ClassVar[tuple[str, ...]] = ("build",)
    decays: ClassVar[bool] = True

    def build(self, peak: float, steps: int) -> optax.Schedule:
        """The learning rate as a function of the step, for a run of `steps` steps."""
        raise NotImplementedError


def _after_warmup(peak: float, warmup: int, then: optax.Schedule) -> optax.Schedule:
    """A linear warm-up to `peak`; `then` counts its steps from the end of it."""
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, warmup)
    return optax.join_schedules([rise, then], [warmup])


class CosineConfig(ScheduleConfig):
    """Linear warm-up over `warmup_steps`, then a half cosine down to `final_fraction` of the peak (as GPT-3's)."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: StepCount = 0
    final_fraction: Fraction = 0.1

    def build(self, peak: float, steps: int) -> optax.Schedule:
        warmup = min(in_steps(self.warmup_steps, steps), steps)
        start = peak / max(warmup, 1)
        return optax.warmup_cosine_decay_schedule(
            start, peak, warmup, max(steps, warmup + 1), peak * self.final_fraction
        )


class LinearConfig(ScheduleConfig):
    """Linear warm-up, then a straight line down to `final_fraction` of the peak (0 by default: Bergsma et al. 2025)."""

    kind: Literal["linear"] = "linear"
    warmup_steps: StepCount = 0
    final_fraction: Fraction = 0.0

    def build(self, peak: float, steps: int) -> optax.Schedule:
        warmup = min(in_steps(self.warmup_steps, steps), steps)
        fall = optax.linear_schedule(peak, peak * self.final_fraction, max(steps - warmup, 1))
        return _after_warmup(peak, warmup, fall)


class ConstantConfig(ScheduleConfig):
    """Linear warm-up over `warmup_steps`, then the peak learning rate to the end."""

    kind: Literal["constant"] = "constant"
    warmup_steps: StepCount = 0
    decays: ClassVar[bool] = False

    def build(self, peak: float, steps: int) -> optax.Schedule:
        constant = optax.constant_schedule(peak)
        warmup = min(in_steps(self.warmup_steps, steps), steps)
        return _after_warmup(peak, warmup, constant) if warmup else constant


class InverseSqrtConfig(ScheduleConfig):
    """Linear warm-up, then peak · sqrt(warmup_steps / step): needs no end (Vaswani et al. 2017).

    A longer warm-up also means a slower decay. Without a warm-up the rate is peak / sqrt(step).
    """

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    warmup_steps: StepCount = 0.02

    def build(self, peak: float, steps: int) -> optax.Schedule:
        warmup = min(in_steps(self.warmup_steps, steps), steps)
        first = max(warmup, 1)

        def fall(step: Array) -> Array:
            return peak * jnp.sqrt(first / jnp.maximum(step + warmup, first))

        return _after_warmup(peak, warmup, fall)


class WSDConfig(ScheduleConfig):
    """Linear warm-up, the peak (stable), then a decay over the last `decay_fraction` of the run (Hu et al. 2024).

    With p the share of the decay that is done, the rate falls from the peak to `final_fraction` of it as 1 - p
    (`linear`), (1 + cos πp)/2 (`cosine`) or 1 - sqrt(p) (`1-sqrt`, the best in Hägele et al. 2024). Where the decay
    would begin before the warm-up ends, it begins at the warm-up's end, and is steeper.
    """

    kind: Literal["wsd"] = "wsd"
    warmup_steps: StepCount = 0
    decay_fraction: Share = 0.2
    decay_shape: DecayShape = "1-sqrt"
    final_fraction: Fraction = 0.0

    def build(self, peak: float, steps: int) -> optax.Schedule:
        warmup = min(in_steps(self.warmup_steps, steps), steps)
        decay = max(min(int(steps * self.decay_fraction), steps - warmup), 1)
        final = peak * self.final_fraction
        fall = {
            "linear": lambda: optax.linear_schedule(peak, final, decay),
            "cosine": lambda: optax.cosine_decay_schedule(peak, decay, self.final_fraction),
            "1-sqrt": lambda: lambda step: final + (peak - final) * (1 - jnp.sqrt(jnp.clip(step / decay, 0, 1))),
        }[self.decay_shape]()
        rise = optax.linear_schedule(peak / max(warmup, 1), peak, warmup)
        return optax.join_schedules([rise, fall], [max(steps - decay, warmup)])


class TrapezoidConfig(ScheduleConfig):
    """`wsd` with a linear decay to 0 (Zhai et al. 2022)."""

    kind: Literal["trapezoid"] = "trapezoid"
    warmup_steps: StepCount = 0
    decay_fraction: Share = 0.2

    def build(self, peak: float, steps: int) -> optax.Schedule:
        wsd = WSDConfig(warmup_steps=self.warmup_steps, decay_fraction=self.decay_fraction, decay_shape="linear")
        return wsd.build(peak, steps)


SCHEDULES: dict[str, type[ScheduleConfig]] = {
    "cosine": CosineConfig,
    "linear": LinearConfig,
    "constant": ConstantConfig,
    "inverse_sqrt": InverseSqrtConfig,
    "wsd": WSDConfig,
    "trapezoid": TrapezoidConfig,
}
