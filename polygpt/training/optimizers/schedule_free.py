"""Schedule-free AdamW, which averages the weights instead of lowering the learning rate."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from pydantic import Field

from polygpt.model import Params
from polygpt.training.optimizers.base import Beta, NonNegative, OptimizerConfig, Positive
from polygpt.training.optimizers.groups import ParameterGroups


class ScheduleFreeConfig(OptimizerConfig):
    """Schedule-free AdamW (Defazio et al. 2024): needs no decaying schedule, and so no number of steps.

    Gradients are taken at y = (1 - b1)·z + b1·x, AdamW without momentum moves z, and x is the average of z, weighted by
    the square of the learning rate. x is what is evaluated, sampled from and saved as the model. The schedule should be
    a warm-up and then constant, which is the default with this optimizer.

    Attributes:
        b1: share of the average in the point at which gradients are taken; it replaces Adam's momentum.
    """

    kind: Literal["schedule_free"] = "schedule_free"
    learning_rate: Positive = 2.5e-3
    b1: Annotated[float, Field(gt=0, lt=1)] = 0.9
    b2: Beta = 0.99
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    averages: ClassVar[bool] = True

    def build(self, parameters: ParameterGroups, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        adamw_without_momentum = optax.chain(
            optax.scale_by_rms(self.b2, self.eps, eps_in_sqrt=False, bias_correction=True),
            parameters.decay(self.weight_decay),
            parameters.descend(learning_rate),
        )
        # optax counts from 1 for the weight of a step in the average, and from 0 for its learning rate.
        return optax.contrib.schedule_free(adamw_without_momentum, lambda count: learning_rate(count - 1), self.b1)

    def evaluated(self, state: PyTree, params: Params) -> Params:
        return optax.contrib.schedule_free_eval_params(state, params)

    def vanishing(self, dtype: jnp.dtype) -> list[str]:
        """A sum of squared learning rates soon stands still in any 16-bit type."""
        return super().vanishing(dtype) + (["learning_rate"] if dtype.itemsize < 4 else [])
