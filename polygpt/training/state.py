"""What a training step takes and gives: a batch, the state, and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from polygpt.data import Loader, MixedLoader
from polygpt.distributed import process_count
from polygpt.model import Params
from polygpt.sharding import Scope
from polygpt.training.guard import Guard
from polygpt.training.loss_scale import LossScale


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
    def of(cls, arrays: Mapping[str, np.ndarray], scope: Scope | None = None) -> Batch:
        """A loader's batch, on the device; its rows split over the mesh, if there is one."""
        if scope is None:
            return cls(**{name: jnp.asarray(values) for name, values in arrays.items()})
        return cls(**{name: jax.device_put(values, scope.rows) for name, values in arrays.items()})

    @classmethod
    def read(cls, loader: Loader | MixedLoader, i: int, scope: Scope | None = None) -> Batch:
        """Batch `i` of a loader. Of several processes, each reads only the rows that its devices hold."""
        if process_count() == 1:
            return cls.of(loader.batch(i), scope)
        shape, sharding = (loader.batch_size, loader.context_length), scope.rows
        held = {range(shape[0])[index[0]] for index in sharding.addressable_devices_indices_map(shape).values()}
        rows = sorted(set().union(*held))
        places = {row: place for place, row in enumerate(rows)}
        arrays = loader.batch(i, rows)

        def own(values: np.ndarray) -> Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                return values[[places[row] for row in range(shape[0])[index[0]]]]

            return jax.make_array_from_callback(shape, sharding, part)

        return cls(**{name: own(values) for name, values in arrays.items()})


class TrainState(NamedTuple):
    """Everything that training changes.

    Attributes:
        params: the weights at which gradients are taken.
        optimizer: the optimizer's state.
        step: updates attempted so far, those skipped by the guard included.
        guard: counters of skipped steps, and statistics of the loss.
        loss_scale: of float16; None for other dtypes.
        average: a moving average of the weights, where one is kept.
    """

    params: Params
    optimizer: PyTree
    step: Int[Array, ""]
    guard: Guard
    loss_scale: LossScale | None = None
    average: Params | None = None


class Metrics(NamedTuple):
    """Metrics of one step.

    Attributes:
        loss: mean nats per token, without auxiliary losses.
        extra: auxiliary losses (weighted) and metrics that the model's parts report, by name.
        grad_norm: global norm of the gradient before clipping. None before the update, as all that follow.
        learning_rate: of this update.
        update_ratio: norm of the update by the norm of the parameters.
        skipped: the update was not finite, and nothing was updated.
        stopped: so many in a row have been skipped that the run must stop.
        in_a_row: how many steps in a row have been skipped, this one included.
        spike: the loss is a spike (see `guard.py`).
        spike_mean, spike_limit: the mean loss before this step, and the loss above which it is a spike.
        loss_scale: the scale of the loss in this step; None unless it is computed in float16.
        expert_load: the share of the batch's choices that each expert received, by layer.
    """

    loss: Float[Array, ""]
    extra: dict[str, Float[Array, ""]]
    grad_norm: Float[Array, ""] | None = None
    learning_rate: Float[Array, ""] | None = None
    update_ratio: Float[Array, ""] | None = None
    skipped: Bool[Array, ""] | None = None
    stopped: Bool[Array, ""] | None = None
    in_a_row: Int[Array, ""] | None = None
    spike: Bool[Array, ""] | None = None
    spike_mean: Float[Array, ""] | None = None
    spike_limit: Float[Array, ""] | None = None
    loss_scale: Float[Array, ""] | None = None
    expert_load: dict[int, Float[Array, " experts"]] | None = None
