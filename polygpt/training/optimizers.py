"""Optimizers and learning-rate schedules, each a frozen configuration with one method."""

from __future__ import annotations

from typing import Annotated, Literal

import jax
import optax
from pydantic import Field, NonNegativeInt

from polygpt.config import PartConfig
from polygpt.model import Model, ParameterInfo

Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class ScheduleConfig(PartConfig):
    """The slot `schedule`."""

    def build(self, peak: float, steps: int) -> optax.Schedule:
        """Step -> learning rate, for a run of `steps` steps."""
        raise NotImplementedError


class CosineConfig(ScheduleConfig):
    """Linear from 0 over `warmup_steps`, then a half cosine to `final_fraction` of the peak (GPT-3's)."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1

    def build(self, peak: float, steps: int) -> optax.Schedule:
        warmup = min(self.warmup_steps, steps)
        # From peak/warmup rather than 0: a first update of size 0 would be a wasted step.
        start = peak / max(warmup, 1)
        return optax.warmup_cosine_decay_schedule(
            start, peak, warmup, max(steps, warmup + 1), peak * self.final_fraction
        )


class TrapezoidConfig(ScheduleConfig):
    """Linear warm-up, flat, then linear to 0 over the last `decay_fraction` of the run (Zhai et al. 2022)."""

    kind: Literal["trapezoid"] = "trapezoid"
    warmup_steps: NonNegativeInt = 0
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2

    def build(self, peak: float, steps: int) -> optax.Schedule:
        warmup, decay = min(self.warmup_steps, steps), max(int(steps * self.decay_fraction), 1)
        rise = optax.linear_schedule(peak / max(warmup, 1), peak, warmup)
        fall = optax.linear_schedule(peak, 0.0, decay)
        return optax.join_schedules([rise, fall], [max(steps - decay, warmup)])


class ConstantConfig(ScheduleConfig):
    """The peak throughout."""

    kind: Literal["constant"] = "constant"

    def build(self, peak: float, steps: int) -> optax.Schedule:
        return optax.constant_schedule(peak)


SCHEDULES: dict[str, type[ScheduleConfig]] = {
    "cosine": CosineConfig,
    "trapezoid": TrapezoidConfig,
    "constant": ConstantConfig,
}


class OptimizerConfig(PartConfig):
    """The slot `optimizer`; every kind has a peak `learning_rate`."""

    learning_rate: Positive

    def build(self, model: Model, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        """The chain that turns (clipped) gradients into updates."""
        raise NotImplementedError


class AdamWConfig(OptimizerConfig):
    """Adam with decoupled weight decay on matrices (Loshchilov & Hutter 2019); gains and biases are not decayed."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: Positive = 3e-4
    b1: Beta = 0.9
    b2: Beta = 0.95
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1

    def build(self, model: Model, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            optax.add_decayed_weights(self.weight_decay, mask=_is_matrix(model)),
            optax.scale_by_learning_rate(learning_rate),
        )


class MuonConfig(OptimizerConfig):
    """Muon for the matrices of blocks, Adam (Nesterov) for embeddings, head, gains and biases (Jordan et al. 2024).

    A matrix's momentum is replaced by the nearest semi-orthogonal matrix (five Newton-Schulz steps). `learning_rate`
    is Muon's; `adam_learning_rate` that of the rest; both follow the schedule.
    """

    kind: Literal["muon"] = "muon"
    learning_rate: Positive = 0.02
    adam_learning_rate: Positive = 3e-3
    momentum: Beta = 0.95
    b1: Beta = 0.9
    b2: Beta = 0.95
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1

    def build(self, model: Model, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        ratio = self.adam_learning_rate / self.learning_rate
        return optax.contrib.muon(
            learning_rate,
            beta=self.momentum,
            eps=self.eps,
            weight_decay=self.weight_decay,
            adam_b1=self.b1,
            adam_b2=self.b2,
            adam_weight_decay=0.0,
            adam_learning_rate=lambda step: learning_rate(step) * ratio,
            muon_weight_dimension_numbers=jax.tree.map(_muon_axes, model.parameters),
        )


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {"adamw": AdamWConfig, "muon": MuonConfig}


def _is_matrix(model: Model) -> dict:
    return jax.tree.map(lambda info: info.inputs is not None, model.parameters)


def _muon_axes(info: ParameterInfo) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a block's matrix are contracted and which are its outputs; None leaves it to AdamW."""
    if not info.inputs or info.axes[0] != "layers":
        return None
    last_input = info.stack + info.inputs
    return optax.contrib.MuonDimensionNumbers(
        reduction_axis=tuple(range(info.stack, last_input)), output_axis=tuple(range(last_input, len(info.shape)))
    )
