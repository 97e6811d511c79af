"""One training step and one evaluation step, as pure functions of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from polygpt.model import Effects, Model, Params
from polygpt.sharding import make_mesh, placement
from polygpt.training.config import TrainingConfig


class Batch(NamedTuple):
    """`mask` is 1 where a target counts; all [B, T]."""

    input: Int[Array, "B T"]
    target: Int[Array, "B T"]
    mask: Float[Array, "B T"]


class TrainState(NamedTuple):
    """All that training changes. `step` is int32, the number of updates done."""

    params: Params
    optimizer: PyTree
    step: Int[Array, ""]


class Metrics(NamedTuple):
    """Of one step.

    Attributes:
        loss: mean nats a token, without auxiliary losses.
        grad_norm: the gradient's global norm before clipping.
        learning_rate: of the optimizer.
        extra: what parts add to the objective (weighted) or want logged, by name.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    extra: dict[str, Float[Array, ""]]


class Trainer:
    """The pure functions of training one model under one configuration."""

    def __init__(self, model: Model, config: TrainingConfig):
        self.model, self.config = model, config
        self.mesh = make_mesh()
        self.learning_rate = config.schedule.build(config.optimizer.learning_rate, config.steps)
        self.optimizer = config.optimizer.build(model, self.learning_rate)

    def init(self, params: Params | None = None) -> TrainState:
        """The state before the first step, with freshly drawn parameters where none are given."""
        params = self.place(self.model.init(self.config.seed) if params is None else params)
        return TrainState(params, jax.jit(self.optimizer.init)(params), jnp.zeros((), jnp.int32))

    def place(self, params: Params) -> Params:
        """`params` where their logical axes belong on the mesh."""
        return jax.device_put(params, placement(self.model.parameters, self.mesh))

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state, nothing allocated."""
        return jax.eval_shape(self.init)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update on one batch. Dropout's key is a function of (seed, step) alone, so a resumed run repeats it."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
        weights = batch.mask / jnp.maximum(batch.mask.sum(), 1)  # the mean over what counts

        def objective(params: Params) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Effects]]:
            loss, effects = self.model.loss(params, batch.input, batch.target, weights, key)
            return sum(effects.losses.values(), loss), (loss, effects)

        (_, (loss, effects)), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
        norm = optax.tree.norm(gradients)
        if self.config.clip_norm is not None:
            scale = jnp.minimum(1.0, self.config.clip_norm / jnp.maximum(norm, 1e-12))
            gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        params = self.model.with_updates(optax.apply_updates(state.params, updates), effects.loads)
        rate = jnp.asarray(self.learning_rate(state.step), jnp.float32)
        metrics = Metrics(loss, norm, rate, {**effects.losses, **effects.metrics})
        return TrainState(params, optimizer, state.step + 1), metrics

    def compile_step(self, state: TrainState, batch: Batch) -> Callable[[TrainState, Batch], tuple]:
        """`step` compiled for these shapes, the old state's memory given to the new one."""
        return jax.jit(self.step, donate_argnums=0).lower(state, batch).compile()


def nll_sums(model: Model, params: Params, batch: Batch) -> Float[Array, "2"]:
    """(Σ nats, Σ tokens) of a batch, without dropout."""
    nll = model.nll(params, batch.input, batch.target)
    return jnp.stack([(nll * batch.mask).sum(), batch.mask.sum()])
