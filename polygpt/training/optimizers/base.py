"""What every optimizer is built from, and the base class of their configurations."""

from __future__ import annotations

from typing import Annotated, ClassVar

import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from pydantic import Field, model_validator

from polygpt.config import PartConfig
from polygpt.model import Params
from polygpt.training.optimizers.groups import ParameterGroups

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(PartConfig):
    """The slot `optimizer`; every kind has a peak `learning_rate`.

    Attributes:
        averages: whether the optimizer itself averages the weights that are evaluated.
    """

    learning_rate: Positive
    needed: ClassVar[tuple[str, ...]] = ("build",)
    averages: ClassVar[bool] = False

    @model_validator(mode="after")
    def _holds_in_float32(self) -> OptimizerConfig:
        if names := OptimizerConfig.vanishing(self, jnp.dtype("float32")):
            value = getattr(self, names[0])
            raise ValueError(f"{names[0]}={value} is {float(jnp.float32(value)):g} in float32; give one that is not")
        return self

    def build(self, parameters: ParameterGroups, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        """The chain that turns (clipped) gradients into updates: usually a direction, then `parameters.decay` and
        `parameters.descend`, which apply the weight decay and the learning rate of each parameter's group.
        """
        raise NotImplementedError

    def evaluated(self, state: PyTree, params: Params) -> Params:
        """The weights to evaluate and save, where they are not those that gradients are taken at."""
        return params

    def vanishing(self, dtype: jnp.dtype) -> list[str]:
        """The settings between 0 and 1 that `dtype` rounds to 0 (an eps) or to 1 (a decay rate)."""
        shares = {name: value for name, value in self if isinstance(value, float) and 0 < value < 1}
        return [name for name, value in shares.items() if float(dtype.type(value)) in (0.0, 1.0)]
