"""From a configuration to the optimizer of a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from polygpt.model import Model, Params
from polygpt.training.optimizers.base import OptimizerConfig
from polygpt.training.optimizers.groups import GroupConfig, ParameterGroups, keep_trained


class Optimizer(NamedTuple):
    """An optimizer as pure functions.

    Attributes:
        init: the state for parameters.
        update: (gradients, state, params) → (updates, state).
        evaluated: (state, params) → the weights to evaluate and save.
        parameters: what is trained.
    """

    init: Callable[[Params], PyTree]
    update: Callable[[Params, PyTree, Params], tuple[Params, PyTree]]
    evaluated: Callable[[PyTree, Params], Params]
    parameters: ParameterGroups


def build_optimizer(
    config: OptimizerConfig, model: Model, learning_rate: optax.Schedule, groups: Sequence[GroupConfig] = ()
) -> Optimizer:
    """The optimizer, with its state and arithmetic in float32 where the parameters' type is too coarse for it.

    It is for float16, in which small squares of gradients are 0, and wherever a setting vanishes: Adam's eps of 1e-8 is
    0 in float16, a b2 of 0.999 is 1 in bfloat16.

    Raises:
        RequestError: a group's pattern matches no parameter.
    """
    parameters = ParameterGroups(model.parameters, groups)
    dtype = jnp.dtype(model.config.param_dtype)
    coarse = dtype == jnp.float16 or bool(config.vanishing(dtype))
    inner = keep_trained(config.build(parameters, learning_rate), parameters)
    optimizer = _in_float32(inner) if coarse else inner

    def evaluated(state: PyTree, params: Params) -> Params:
        trained = parameters.select(params)
        found = config.evaluated(state, _cast(trained) if coarse else trained)
        return parameters.replace(params, jax.tree.map(lambda value, p: value.astype(p.dtype), found, trained))

    return Optimizer(optimizer.init, optimizer.update, evaluated, parameters)


def _in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.GradientTransformation(
        lambda params: optimizer.init(_cast(params)),
        lambda gradients, state, params: optimizer.update(_cast(gradients), state, _cast(params)),
    )


def _cast(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
