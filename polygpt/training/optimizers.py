"""Optimizers and learning-rate schedules, each a frozen configuration with one method."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from pydantic import Field, NonNegativeInt

from polygpt.config import PartConfig
from polygpt.model import Model, ParameterInfo

Positive = Annotated[float, Field(gt=0)]
StepCount = NonNegativeInt | Annotated[float, Field(gt=0, lt=1)]
"""A number of steps, or (below 1) a share of the run's."""
Beta = Annotated[float, Field(ge=0, lt=1)]


def in_steps(count: int | float, steps: int) -> int:
    """A `StepCount` as a number of steps, for a run of `steps`; a share is at least one step."""
    return count if isinstance(count, int) else max(round(count * steps), 1)


class ScheduleConfig(PartConfig):
    """The slot `schedule`."""

    needed: ClassVar[tuple[str, ...]] = ("build",)

    def build(self, peak: float, steps: int) -> optax.Schedule:
        """The learning rate as a function of the step, for a run of `steps` steps."""
        raise NotImplementedError


class CosineConfig(ScheduleConfig):
    """Linear warm-up over `warmup_steps`, then a half cosine down to `final_fraction` of the peak (as GPT-3's)."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: StepCount = 0
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1

    def build(self, peak: float, steps: int) -> optax.Schedule:
        warmup = min(in_steps(self.warmup_steps, steps), steps)
        # The warm-up starts at peak/warmup: an update with learning rate 0 would be a wasted step.
        start = peak / max(warmup, 1)
        return optax.warmup_cosine_decay_schedule(
            start, peak, warmup, max(steps, warmup + 1), peak * self.final_fraction
        )


class TrapezoidConfig(ScheduleConfig):
    """Linear warm-up, constant, then linear to 0 over the last `decay_fraction` of the run (Zhai et al. 2022).

    Where the decay would begin before the warm-up ends, it begins at the warm-up's end, and is steeper.
    """

    kind: Literal["trapezoid"] = "trapezoid"
    warmup_steps: StepCount = 0
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2

    def build(self, peak: float, steps: int) -> optax.Schedule:
        warmup = min(in_steps(self.warmup_steps, steps), steps)
        decay = max(min(int(steps * self.decay_fraction), steps - warmup), 1)
        rise = optax.linear_schedule(peak / max(warmup, 1), peak, warmup)
        fall = optax.linear_schedule(peak, 0.0, decay)
        return optax.join_schedules([rise, fall], [max(steps - decay, warmup)])


class ConstantConfig(ScheduleConfig):
    """The peak learning rate throughout."""

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
    needed: ClassVar[tuple[str, ...]] = ("build",)

    def build(self, model: Model, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        """The chain that turns (clipped) gradients into updates."""
        raise NotImplementedError

    def vanishing(self, dtype: jnp.dtype) -> list[str]:
        """The settings between 0 and 1 that `dtype` rounds to 0 (an eps) or to 1 (a decay rate)."""
        shares = {name: value for name, value in self if isinstance(value, float) and 0 < value < 1}
        return [name for name, value in shares.items() if float(dtype.type(value)) in (0.0, 1.0)]


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

    Muon's update is the semi-orthogonal matrix nearest to the momentum (five Newton-Schulz steps). `learning_rate` is
    for Muon, `adam_learning_rate` for the other parameters; both follow the schedule.
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


def build_optimizer(
    config: OptimizerConfig, model: Model, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    """The optimizer, with its state and arithmetic in float32 where the parameters' type is too coarse for it.

    It is for float16, in which small squares of gradients are 0, and wherever a setting vanishes: Adam's eps of 1e-8 is
    0 in float16, a b2 of 0.999 is 1 in bfloat16.
    """
    optimizer, dtype = config.build(model, learning_rate), jnp.dtype(model.config.param_dtype)
    return _in_float32(optimizer) if dtype == jnp.float16 or config.vanishing(dtype) else optimizer


def _in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    def cast(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    return optax.GradientTransformation(
        lambda params: optimizer.init(cast(params)),
        lambda gradients, state, params: optimizer.update(cast(gradients), state, cast(params)),
    )


def _is_matrix(model: Model) -> dict:
    return jax.tree.map(lambda info: info.inputs is not None, model.parameters)


def _muon_axes(info: ParameterInfo) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a block's matrix are inputs (contracted) and which are outputs; None leaves it to Adam."""
    if not info.inputs or info.axes[0] != "layers":
        return None
    last_input = info.stack + info.inputs
    return optax.contrib.MuonDimensionNumbers(
        reduction_axis=tuple(range(info.stack, last_input)), output_axis=tuple(range(last_input, len(info.shape)))
    )
