"""One training step and the loss on held-out windows, as pure functions of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from polygpt.model import Effects, Model, Params
from polygpt.sharding import make_mesh, placement
from polygpt.training.config import TrainingConfig
from polygpt.training.optimizers import build_optimizer


class Batch(NamedTuple):
    """Windows of tokens, [B, T] each.

    Attributes:
        input, target: token ids; targets are the inputs one token later.
        mask: 1 where a target counts, 0 elsewhere.
        segment_ids: of packed documents: each is a run of equal ids and sees itself alone. None: a row is one document.
    """

    input: Int[Array, "B T"]
    target: Int[Array, "B T"]
    mask: Float[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None = None

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Batch:
        """A loader's batch, on the device."""
        return cls(**{name: jnp.asarray(values) for name, values in arrays.items()})


class TrainState(NamedTuple):
    """Everything that training changes. `step` is int32, the number of updates done."""

    params: Params
    optimizer: PyTree
    step: Int[Array, ""]


class Metrics(NamedTuple):
    """Metrics of one step.

    Attributes:
        loss: mean nats per token, without auxiliary losses.
        extra: auxiliary losses (weighted) and metrics that the model's parts report, by name.
        grad_norm: global norm of the gradient before clipping; None before the update.
        learning_rate: of this update; None before it.
    """

    loss: Float[Array, ""]
    extra: dict[str, Float[Array, ""]]
    grad_norm: Float[Array, ""] | None = None
    learning_rate: Float[Array, ""] | None = None


class Trainer:
    """The pure functions that train one model under one configuration."""

    def __init__(self, model: Model, config: TrainingConfig):
        self.model, self.config = model, config
        self.shardings = placement(model.parameters, make_mesh())
        self.learning_rate = config.schedule.build(config.optimizer.learning_rate, config.steps)
        self.optimizer = build_optimizer(config.optimizer, model, self.learning_rate)

    def init(self, params: Params | None = None) -> TrainState:
        """The state before the first step, with newly drawn parameters if none are given."""
        params = self.model.init(self.config.seeds.init, self.shardings) if params is None else self.place(params)
        return TrainState(params, jax.jit(self.optimizer.init)(params), jnp.zeros((), jnp.int32))

    def place(self, params: Params) -> Params:
        """`params` on the devices where their logical axes put them."""
        return jax.device_put(params, self.shardings)

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state; allocates nothing."""
        return jax.eval_shape(self.init)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update from one batch."""
        gradients, metrics, effects = self.gradients(state, batch)
        state, norm, rate = self.apply(state, gradients, effects)
        return state, metrics._replace(grad_norm=norm, learning_rate=rate)

    def gradients(self, state: TrainState, batch: Batch) -> tuple[Params, Metrics, Effects]:
        """Gradients of the mean loss over what counts, plus auxiliary losses; and what the model's parts report.

        Dropout's key depends on (seed, step) alone, so that a resumed run repeats it.
        """
        key = jax.random.fold_in(jax.random.key(self.config.seeds.dropout), state.step)
        weights = batch.mask / jnp.maximum(batch.mask.sum(), 1)

        def objective(params: Params) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Effects]]:
            loss, effects = self.model.loss(params, batch.input, batch.target, weights, key, batch.segment_ids)
            return sum(effects.losses.values(), loss), (loss, effects)

        (_, (loss, effects)), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
        return gradients, Metrics(loss, {**effects.losses, **effects.metrics}), effects

    def apply(
        self, state: TrainState, gradients: Params, effects: Effects
    ) -> tuple[TrainState, Float[Array, ""], Float[Array, ""]]:
        """The state after one update, the gradients' norm before clipping, and the learning rate."""
        # The squares of float16's gradients would overflow or vanish.
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32) if g.dtype == jnp.float16 else g, gradients)
        norm = optax.tree.norm(gradients)
        if self.config.clip_norm is not None:
            scale = jnp.minimum(1.0, self.config.clip_norm / jnp.maximum(norm, 1e-12))
            gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        params = self.model.with_updates(optax.apply_updates(state.params, updates), effects.loads)
        rate = jnp.asarray(self.learning_rate(state.step), jnp.float32)
        return TrainState(params, optimizer, state.step + 1), norm, rate

    def compile_step(self, state: TrainState, batch: Batch) -> Callable[[TrainState, Batch], tuple]:
        """`step` compiled for these shapes; the new state reuses the old one's memory."""
        return jax.jit(self.step, donate_argnums=0).lower(state, batch).compile()


def nll_sums(model: Model, params: Params, batch: Batch) -> Float[Array, "2"]:
    """(Σ nats, Σ tokens) of a batch, without dropout."""
    nll = model.nll(params, batch.input, batch.target, batch.segment_ids)
    return jnp.stack([(nll * batch.mask).sum(), batch.mask.sum()])
