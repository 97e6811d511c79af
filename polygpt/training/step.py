"""One training step and the loss on held-out windows, as pure functions of arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from polygpt.model import Effects, Loads, Model, Params, matmul_precision
from polygpt.sharding import Scope, constrain, make_mesh, use_mesh
from polygpt.training.config import TrainingConfig
from polygpt.training.guard import Guard, choose
from polygpt.training.loss_scale import LossScale
from polygpt.training.optimizers import build_optimizer, start_average, update_average
from polygpt.training.placement import optimizer_placement
from polygpt.training.process_sum import summed, sums_in_one_message
from polygpt.training.state import Batch, Metrics, TrainState


class Trainer:
    """The pure functions that train one model under one configuration, on one device or on a mesh."""

    def __init__(self, model: Model, config: TrainingConfig, scope: Scope | None = None):
        self.model, self.config, self.scope = model, config, scope
        self.shardings = (scope or Scope(make_mesh())).placement(model.parameters)
        self.learning_rate = config.schedule.build(config.optimizer.learning_rate, config.steps)
        self.optimizer = build_optimizer(config.optimizer, model, self.learning_rate, config.groups)
        self.groups = self.optimizer.parameters
        self._evaluated = jax.jit(self.optimizer.evaluated, out_shardings=None if scope is None else self.shardings)

    def init(self, params: Params | None = None) -> TrainState:
        """The state before the first step, with newly drawn parameters if none are given."""
        params = self.model.init(self.config.seeds.init, self.shardings) if params is None else self.place(params)
        if self.scope is None:
            return self._started(params, jax.jit(self.optimizer.init)(params))

        def rest(params: Params) -> TrainState:
            return self._started(params, self.optimizer.init(params))._replace(params=None)

        start = jax.jit(rest, out_shardings=self.state_shardings._replace(params=None))
        return start(params)._replace(params=params)

    def _started(self, params: Params, optimizer: PyTree) -> TrainState:
        """The state around the first parameters and the optimizer's state."""
        scale = LossScale.new(self.config.loss_scale) if self.scales_loss else None
        average = None if self.config.ema_decay is None else start_average(params)
        return TrainState(params, optimizer, jnp.zeros((), jnp.int32), Guard.new(), scale, average)

    @cached_property
    def state_shardings(self) -> TrainState:
        """Where the arrays of the state go on the mesh."""
        params = jax.tree.map(lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype), self.model.parameters)
        optimizer = jax.eval_shape(self.optimizer.init, params)
        state = jax.eval_shape(self._started, params, optimizer)
        replicated = jax.tree.map(lambda _: self.scope.replicated, state)
        return replicated._replace(
            params=self.shardings,
            optimizer=optimizer_placement(optimizer, self.model.parameters, self.scope),
            average=None if state.average is None else self.shardings,
        )

    @property
    def scales_loss(self) -> bool:
        """Whether gradients are computed in float16, and the loss therefore scaled."""
        return self.model.config.compute_dtype == "float16"

    def evaluated(self, state: TrainState) -> Params:
        """The weights that are validated, sampled from, saved as the model's and exported.

        They are the moving average, or schedule-free's, where there is one, and the `params` themselves otherwise.
        """
        if state.average is not None:
            return jax.tree.map(lambda average, p: average.astype(p.dtype), state.average, state.params)
        return self._evaluated(state.optimizer, state.params) if self.config.optimizer.averages else state.params

    def place(self, params: Params) -> Params:
        """`params` on the devices where their logical axes put them."""
        return jax.device_put(params, self.shardings)

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state; allocates nothing."""
        return jax.eval_shape(self.init)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update from one batch."""
        return self.apply(state, *self.gradients(state, batch))

    def gradients(self, state: TrainState, batch: Batch) -> tuple[Params, Metrics, Effects]:
        """Gradients of the mean loss over what counts, plus auxiliary losses; and what the model's parts report.

        With `accumulation_steps` the batch is cut into as many parts of equal size, and gradients are summed in
        float32. Tokens count as in the whole batch, and so do loads: for auxiliary losses that depend on them they are
        gathered first, at the cost of another forward pass. Dropout's key depends on (seed, step, part) alone, so that
        a resumed run repeats it.
        """
        key = jax.random.fold_in(jax.random.key(self.config.seeds.dropout), state.step)
        batch = batch._replace(mask=batch.mask / jnp.maximum(batch.mask.sum(), 1))  # now each token's weight
        count = self.config.accumulation_steps
        if count == 1:
            gradients, metrics, effects = self._part_gradients(state, batch, key)
        else:
            parts = jax.tree.map(
                lambda leaf: constrain(leaf.reshape(count, -1, leaf.shape[1]), None, "batch", None), batch
            )
            keys = jax.vmap(lambda part: jax.random.fold_in(key, part))(jnp.arange(count))
            loads = self._loads(state, parts, keys) if self._needs_loads else None

            def one(total: PyTree, part: tuple[Batch, PRNGKeyArray]) -> tuple[PyTree, None]:
                found = self._part_gradients(state, *part, loads=loads, share=1 / count)
                return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, found), None

            shapes = self._part_shapes(state, parts, keys, loads)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
            zeros = (self._as_stored(zeros[0]), *zeros[1:])
            (gradients, metrics, effects), _ = lax.scan(one, zeros, (parts, keys))
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, state.params)
        # The squares of float16's gradients would overflow or vanish: they stay in float32.
        gradients = jax.tree.map(
            lambda g, dtype: g.astype(jnp.float32 if dtype == jnp.float16 else dtype), gradients, dtypes
        )
        if state.loss_scale is not None:
            gradients = jax.tree.map(lambda g: g / state.loss_scale.scale.astype(g.dtype), gradients)
        return gradients, metrics, effects

    def _part_gradients(
        self,
        state: TrainState,
        part: Batch,
        key: PRNGKeyArray,
        loads: Loads | None = None,
        share: float = 1,
    ) -> tuple[Params, Metrics, Effects]:
        """What a part of the batch adds to the (scaled) gradients, to the metrics and to the effects.

        Args:
            part: its mask holds each token's weight in the batch.
            loads: of the whole batch.
            share: the part's share in the batch, with which means over tokens count.
        """
        scale = jnp.float32(1) if state.loss_scale is None else state.loss_scale.scale

        def own(params: Params, rows: Batch) -> tuple[Params, Metrics, Effects]:
            return self._own_gradients(params, rows, scale, key, loads, share)

        summable = sums_in_one_message(self.model, self.scope)
        if summable and not jax.tree.leaves(jax.eval_shape(own, state.params, part)[2]):
            gradients, *rest = summed(own, self.scope, state.params, part)
        else:
            gradients, *rest = own(state.params, part)
        return self._as_stored(gradients), *rest

    def _own_gradients(
        self, params: Params, part: Batch, scale: Array, key: PRNGKeyArray, loads: Loads | None, share: float
    ) -> tuple[Params, Metrics, Effects]:
        """As `_part_gradients`, of the rows that are here; `scale` is that of the loss."""

        def objective(params: Params) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Effects]]:
            # Weights are scaled rather than the loss: the logits' gradients would be 0 in float16 otherwise.
            weights = part.mask * scale
            loss, effects = self.model.loss(
                params, part.input, part.target, weights, key, part.segment_ids, loads, self.config.remat
            )
            effects = jax.tree.map(lambda leaf: leaf * share, effects)
            return loss + scale * sum(effects.losses.values(), jnp.float32(0)), (loss / scale, effects)

        with matmul_precision(self.model.config):
            (_, (loss, effects)), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        return gradients, Metrics(loss, {**effects.losses, **effects.metrics}), effects

    def _part_shapes(self, state: TrainState, parts: Batch, keys: PRNGKeyArray, loads: Loads | None) -> PyTree:
        first = jax.tree.map(lambda leaf: leaf[0], (parts, keys))
        return jax.eval_shape(lambda part, key: self._part_gradients(state, part, key, loads), *first)

    @cached_property
    def _needs_loads(self) -> bool:
        return any(layer.feedforward.loss_needs_loads() for layer in self.model.config.layers)

    def _loads(self, state: TrainState, parts: Batch, keys: PRNGKeyArray) -> Loads:
        """The model's loads over the whole batch."""

        def one(_: None, part: tuple[Batch, PRNGKeyArray]) -> tuple[None, Loads]:
            batch, key = part
            output = self.model.hidden(state.params, batch.input, segment_ids=batch.segment_ids, training=True, key=key)
            return None, output.effects.loads

        return jax.tree.map(lambda leaf: leaf.mean(0), lax.scan(one, None, (parts, keys))[1])

    def apply(
        self, state: TrainState, gradients: Params, metrics: Metrics, effects: Effects
    ) -> tuple[TrainState, Metrics]:
        """The state after one update, and its metrics.

        If the loss, the gradient or an updated parameter is not finite, only counters (and float16's loss scale)
        change. After `max_skipped_steps` such steps in a row nothing changes any more, `step` included: the state in
        which a run stops does not depend on when the metrics are looked at.
        """
        gradients = self.groups.freeze(gradients, jax.tree.map(jnp.zeros_like, gradients))
        norm = _norm(gradients)
        if self.config.clip_norm is not None:
            factor = jnp.minimum(1.0, self.config.clip_norm / jnp.maximum(norm, 1e-12))
            gradients = jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)
        updates, _ = self.optimizer.update(gradients, state.optimizer, state.params)

        def updated(params: Params) -> Params:
            moved = self.model.with_updates(optax.apply_updates(params, updates), effects.loads)
            return self.groups.freeze(moved, params)

        params_norm = _norm(updated(state.params))
        finite = jnp.isfinite(metrics.loss) & jnp.isfinite(norm) & jnp.isfinite(params_norm)
        limit = state.guard.limit(self.config.spike_threshold)
        stopped = self.is_stopped(state)
        guard = choose(finite, state.guard.after_step(metrics.loss, limit), state.guard.after_skipping())

        def update(state: TrainState) -> TrainState:
            params = updated(state.params)
            _, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
            return state._replace(params=params, optimizer=optimizer, average=self._average(state, params))

        # The optimizer's state is computed again where it can overwrite the old one. A selection between the old and
        # the new state would keep both in memory: 0.9 GB more in a GPT-2 of 124 M parameters.
        after = lax.cond(finite & ~stopped, update, lambda state: state, state)
        after = after._replace(step=state.step + ~stopped, guard=choose(stopped, state.guard, guard))
        if state.loss_scale is not None:
            after = after._replace(loss_scale=state.loss_scale.next(finite, self.config.loss_scale))
        return after, metrics._replace(
            grad_norm=norm,
            # Skipped steps are none to the optimizer.
            learning_rate=jnp.asarray(self.learning_rate(state.step - state.guard.skipped), jnp.float32),
            update_ratio=jnp.where(finite, _norm(updates) / jnp.maximum(params_norm, 1e-12), 0),
            skipped=~finite | stopped,
            stopped=self.is_stopped(after),
            in_a_row=after.guard.in_a_row,
            spike=finite & (metrics.loss > limit),
            spike_mean=state.guard.mean,
            spike_limit=limit,
            loss_scale=None if state.loss_scale is None else state.loss_scale.scale,
            expert_load=_by_layer(effects.loads, len(self.model.config.pattern)),
        )

    def _average(self, state: TrainState, params: Params) -> Params | None:
        """The moving average after the update that made `params`."""
        if state.average is None:
            return None
        updates = state.step + 1 - state.guard.skipped
        return update_average(state.average, params, self.config.ema_decay, updates)

    def is_stopped(self, state: TrainState) -> Bool[Array, ""]:
        """Whether `max_skipped_steps` in a row have been skipped (in float16: at the smallest loss scale)."""
        many = state.guard.in_a_row >= self.config.max_skipped_steps
        return many if state.loss_scale is None else many & state.loss_scale.is_least

    def compile_step(self, state: TrainState, batch: Batch) -> Callable[[TrainState, Batch], tuple]:
        """`step` compiled for these shapes; the new state reuses the old one's memory."""
        return self.lower_step(state, batch).compile()

    def lower_step(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """`step` traced for these arrays, or their shapes."""
        placed = None if self.scope is None else (self.state_shardings, self.scope.replicated)
        with use_mesh(self.scope):
            return jax.jit(self.step, donate_argnums=0, out_shardings=placed).lower(state, batch)

    def _as_stored(self, tree: Params) -> Params:
        """A tree like the parameters, on a mesh split as they are."""
        return tree if self.scope is None else lax.with_sharding_constraint(tree, self.shardings)


def _norm(tree: PyTree) -> Float[Array, ""]:
    return optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree))


def _by_layer(loads: Loads, period: int) -> dict[int, Float[Array, " experts"]]:
    """The loads of each layer that has experts; entry i of the pattern serves layers i, i + period, and so on."""
    layers = {entry + row * period: load for entry, kept in loads.items() for row, load in enumerate(kept["load"])}
    return dict(sorted(layers.items()))


def nll_sums(model: Model, params: Params, batch: Batch) -> Float[Array, "2"]:
    """(Σ nats, Σ tokens) of a batch, without dropout."""
    nll = model.nll(params, batch.input, batch.target, batch.segment_ids)
    return jnp.stack([(nll * batch.mask).sum(), batch.mask.sum()])
