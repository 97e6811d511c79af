"""Optimizers with a step of its own for each number: AdamW, Lion, and SGD, which has one for all."""

from __future__ import annotations

from typing import Literal

import optax

from polygpt.training.optimizers.base import Beta, NonNegative, OptimizerConfig, Positive
from polygpt.training.optimizers.groups import ParameterGroups


class AdamWConfig(OptimizerConfig):
    """Adam with decoupled weight decay on matrices (Loshchilov & Hutter 2019); gains and biases are not decayed."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: Positive = 3e-4
    b1: Beta = 0.9
    b2: Beta = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1

    def build(self, parameters: ParameterGroups, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            parameters.decay(self.weight_decay),
            parameters.descend(learning_rate),
        )


class LionConfig(OptimizerConfig):
    """Lion: the sign of an interpolated momentum (Chen et al. 2023); one moment, half of Adam's memory.

    All steps are of one length, so the learning rate is three to ten times smaller than AdamW's, and the weight decay
    as many times larger.

    Attributes:
        b1: share of the momentum in the sign that is taken; the rest is the gradient.
        b2: decay of the momentum.
    """

    kind: Literal["lion"] = "lion"
    learning_rate: Positive = 1e-4
    b1: Beta = 0.9
    b2: Beta = 0.99
    weight_decay: NonNegative = 0.3

    def build(self, parameters: ParameterGroups, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_lion(self.b1, self.b2),
            parameters.decay(self.weight_decay),
            parameters.descend(learning_rate),
        )


class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum, m ← momentum·m + g (Sutskever et al. 2013), weight decay decoupled.

    Attributes:
        momentum: decay of the sum of gradients; 0 keeps none.
        nesterov: the update is g + momentum·m instead of m.
    """

    kind: Literal["sgd"] = "sgd"
    learning_rate: Positive = 0.1
    momentum: Beta = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 0.0

    def build(self, parameters: ParameterGroups, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.chain(
            optax.trace(self.momentum, self.nesterov) if self.momentum else optax.identity(),
            parameters.decay(self.weight_decay),
            parameters.descend(learning_rate),
        )
