"""What a checkpoint holds, and a copy of it that training cannot overwrite."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree


@dataclass(frozen=True)
class Evaluation:
    """A validation loss, in nats per token, and the step at which it was measured."""

    step: int
    val_loss: float


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds: two trees of arrays, and plain values that go to `info.json`.

    Attributes:
        step: updates attempted.
        params: the model's weights, as they are evaluated and loaded.
        training: everything else that resuming needs; None for a model alone, which cannot be resumed.
        fingerprints: what must be the same when training resumes, by name.
        batch_offset: batches that rollbacks have left out: the next batch is number `step + batch_offset`.
        rollbacks: how often the run has gone back to the newest periodic checkpoint.
        recent_losses: of the last steps, for the mean that a run reports.
        best: the lowest validation loss so far; None before the first evaluation.
        tokens_per_second: training speed so far.
    """

    step: int
    params: PyTree
    training: PyTree | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    batch_offset: int = 0
    rollbacks: int = 0
    recent_losses: tuple[float, ...] = ()
    best: Evaluation | None = None
    tokens_per_second: float = 0.0

    @property
    def arrays(self) -> dict[str, PyTree]:
        """The trees of arrays, by the name of their folder."""
        trees = {"params": self.params, "training": self.training}
        return {name: tree for name, tree in trees.items() if tree is not None}

    @property
    def info(self) -> dict[str, Any]:
        """The plain values, for `info.json`."""
        values = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("params", "training")
        }
        return values | {"best": None if self.best is None else dataclasses.asdict(self.best)}

    def copied(self) -> Snapshot:
        """The snapshot with its arrays copied into the host's memory, so that their buffers may be reused."""
        params, training = _copied((self.params, self.training))
        return dataclasses.replace(self, params=params, training=training)


def snapshot_of(info: Mapping[str, Any], params: PyTree, training: PyTree | None) -> Snapshot:
    """The snapshot with the plain values that `info.json` holds."""
    known = {f.name for f in dataclasses.fields(Snapshot)}
    values = {name: value for name, value in info.items() if name in known}
    best = values.get("best")
    values["best"] = None if best is None else Evaluation(**best)
    values["recent_losses"] = tuple(values.get("recent_losses", ()))
    return Snapshot(params=params, training=training, **values)


def _copied(tree: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    for leaf in leaves:  # all transfers are started before the first is waited for
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    # On a CPU, np.asarray is a view, and a step does not reuse the buffer of an array that has one.
    return jax.tree.unflatten(structure, [np.array(leaf, copy=True) for leaf in leaves])
