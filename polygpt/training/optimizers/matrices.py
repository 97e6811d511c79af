"""Optimizers that know a matrix from a vector: Muon and Adafactor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree
from pydantic import PositiveInt

from polygpt.model import ParameterInfo
from polygpt.training.optimizers.base import Beta, NonNegative, OptimizerConfig, Positive
from polygpt.training.optimizers.groups import ParameterGroups


class MuonConfig(OptimizerConfig):
    """Muon for the matrices of blocks, Adam (Nesterov) for embeddings, head, gains and biases (Jordan et al. 2024).

    Muon's update is the semi-orthogonal matrix nearest to the momentum (five Newton-Schulz steps). `learning_rate` is
    for Muon, `adam_learning_rate` for the other parameters; both follow the schedule. `weight_decay` is for Muon's
    matrices alone.
    """

    kind: Literal["muon"] = "muon"
    learning_rate: Positive = 0.02
    adam_learning_rate: Positive = 3e-3
    momentum: Beta = 0.95
    b1: Beta = 0.9
    b2: Beta = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1

    def build(self, parameters: ParameterGroups, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        ratio = self.adam_learning_rate / self.learning_rate
        # With a learning rate of -1, optax's whole recipe is the direction alone.
        direction = optax.contrib.muon(
            -1.0,
            beta=self.momentum,
            eps=self.eps,
            adam_b1=self.b1,
            adam_b2=self.b2,
            muon_weight_dimension_numbers=jax.tree.map(_muon_axes, parameters.infos),
        )
        return optax.chain(
            direction,
            parameters.decay(self.weight_decay, where=_is_muons),
            parameters.descend(learning_rate, lambda info: 1.0 if _is_muons(info) else ratio),
        )


def _is_muons(info: ParameterInfo) -> bool:
    return bool(info.inputs) and info.axes[0] == "layers"


def _muon_axes(info: ParameterInfo) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a block's matrix are inputs (contracted) and which are outputs; None leaves it to Adam."""
    if not _is_muons(info):
        return None
    last_input = info.stack + info.inputs
    return optax.contrib.MuonDimensionNumbers(
        reduction_axis=tuple(range(info.stack, last_input)), output_axis=tuple(range(last_input, len(info.shape)))
    )


class AdafactorConfig(OptimizerConfig):
    """Adafactor: of each matrix's second moments only the means of rows and columns are kept (Shazeer & Stern 2018).

    They take next to no memory. As in T5, an update is relative: its root mean square is at most `clipping_threshold`,
    times that of the matrix (at least 0.001). Each layer's and each expert's matrix counts by itself.

    Attributes:
        learning_rate: the schedule's peak, relative to each matrix's root mean square.
        decay_rate: the second moments decay by 1 - step^(-decay_rate).
        clipping_threshold: updates whose root mean square is larger are scaled down to it.
        min_dim_to_factor: a matrix with a shorter side keeps every second moment.
        relative: whether updates are multiplied by the root mean square of the parameters.
    """

    kind: Literal["adafactor"] = "adafactor"
    learning_rate: Positive = 1e-2
    decay_rate: Beta = 0.8
    clipping_threshold: Positive = 1.0
    min_dim_to_factor: PositiveInt = 128
    relative: bool = True
    eps: Positive = 1e-30
    weight_decay: NonNegative = 0.0

    def build(self, parameters: ParameterGroups, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        direction = optax.chain(
            optax.scale_by_factored_rms(
                decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_dim_to_factor, epsilon=self.eps
            ),
            optax.clip_by_block_rms(self.clipping_threshold),
            optax.scale_by_param_block_rms() if self.relative else optax.identity(),
        )
        return optax.chain(
            _for_each_matrix(direction, parameters.infos),
            parameters.decay(self.weight_decay),
            parameters.descend(learning_rate),
        )

    def vanishing(self, dtype: jnp.dtype) -> list[str]:
        """All 16-bit types round 1 - step^(-decay_rate) to 1 before long."""
        return super().vanishing(dtype) + (["decay_rate"] if dtype.itemsize < 4 else [])


def _for_each_matrix(optimizer: optax.GradientTransformation, infos: PyTree) -> optax.GradientTransformation:
    """`optimizer` for every matrix of a stack by itself, with the axes on each side of the matrix as one."""

    def mapped(function: Callable, info: ParameterInfo, params: Array, *rest: PyTree) -> PyTree:
        return jax.vmap(function)(_as_matrices(info, params), *rest)

    def init(params: PyTree) -> PyTree:
        return jax.tree.map(lambda info, p: mapped(optimizer.init, info, p), infos, params)

    def update(updates: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        def one(info: ParameterInfo, gradient: Array, own: PyTree, parameter: Array) -> _Updated:
            matrices = _as_matrices(info, parameter)
            changed, own = mapped(optimizer.update, info, gradient, own, matrices)
            return _Updated(changed.reshape(info.shape), own)

        both = jax.tree.map(one, infos, updates, state, params)
        return jax.tree.map(lambda b: b.update, both), jax.tree.map(lambda b: b.state, both)

    return optax.GradientTransformation(init, update)


class _Updated:
    """An update and a state, opaque to `jax.tree.map`."""

    def __init__(self, update: Array, state: PyTree):
        self.update, self.state = update, state


def _as_matrices(info: ParameterInfo, values: Array) -> Array:
    """[stack, inputs, outputs], or [stack, …] of a vector or a table."""
    count = math.prod(info.shape[: info.stack])
    if not info.inputs:
        return values.reshape(count, *info.shape[info.stack :])
    inputs, outputs = info.sides
    return values.reshape(count, math.prod(inputs), math.prod(outputs))
