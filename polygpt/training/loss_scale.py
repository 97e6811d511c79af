"""Dynamic loss scaling for float16, whose gradients would otherwise vanish (Micikevicius et al. 2017, section 3.2)."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field, PositiveInt

from polygpt.config import Config

LARGEST = 2.0**24


class LossScaleConfig(Config):
    """Dynamic loss scaling; it is used when `model.compute_dtype` is float16, and only then.

    The loss is multiplied by a scale before gradients are taken, and the gradients are divided by it, in float32,
    before anything else is done with them. A step whose gradients overflow is skipped and halves the scale, down to 1;
    `growth_interval` steps without an overflow double it.

    Attributes:
        initial: the first scale.
        growth_interval: steps without an overflow after which the scale doubles.
    """

    initial: Annotated[float, Field(ge=1, le=LARGEST)] = 2.0**15
    growth_interval: PositiveInt = 2000


class LossScale(NamedTuple):
    """The scale, and how many steps there have been since it last changed."""

    scale: Float[Array, ""]
    steps: Int[Array, ""]

    @classmethod
    def new(cls, config: LossScaleConfig) -> LossScale:
        """Before the first step."""
        return cls(jnp.float32(config.initial), jnp.zeros((), jnp.int32))

    def next(self, finite: Bool[Array, ""], config: LossScaleConfig) -> LossScale:
        """After a step whose gradients were `finite` or not."""
        steps = jnp.where(finite, self.steps + 1, 0)
        grows = steps >= config.growth_interval
        grown = jnp.where(grows, jnp.minimum(self.scale * 2, LARGEST), self.scale)
        return LossScale(jnp.where(finite, grown, jnp.maximum(self.scale / 2, 1)), jnp.where(grows, 0, steps))

    @property
    def is_least(self) -> Bool[Array, ""]:
        """Whether halving it again would not help."""
        return self.scale <= 1
