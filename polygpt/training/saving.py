"""Checkpoints of a run: which arrays and plain values they hold, and the job that saves them."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import jax
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from polygpt import checkpoint
from polygpt.checkpoint import Keep, NotFiniteError, Snapshot
from polygpt.distributed import is_main, process_count
from polygpt.errors import PolygptError
from polygpt.files import write_text
from polygpt.loading import BEST, CHECKPOINTS
from polygpt.model import Params
from polygpt.training.events import Listener, Note, Saved
from polygpt.training.meter import Meter
from polygpt.training.optimizers import in_steps
from polygpt.training.run_folder import Run
from polygpt.training.state import TrainState
from polygpt.training.step import Trainer


def split_state(trainer: Trainer, state: TrainState) -> tuple[Params, dict[str, PyTree]]:
    """The weights that are evaluated, and everything else in the state, by name.

    A field of the state that is itself what is evaluated is not stored twice.
    """
    params = trainer.evaluated(state)
    return params, {k: v for k, v in state._asdict().items() if v is not None and v is not params}


def join_state(trainer: Trainer, params: Params, training: dict[str, PyTree]) -> TrainState:
    """The state that `split_state` took apart, on the devices where it belongs."""
    missing = [name for name in TrainState._fields if name not in training]
    like = trainer.abstract_state()
    fields = {name: params for name in missing if getattr(like, name) is not None} | training
    fields |= {name: trainer.place(fields[name]) for name in ("params",)}
    return TrainState(**fields)


def abstract_parts(trainer: Trainer) -> tuple[Params, dict[str, PyTree]]:
    """Shapes and dtypes of what `split_state` gives, and on a mesh where they go; allocates nothing."""
    params, training = jax.eval_shape(lambda state: split_state(trainer, state), trainer.abstract_state())
    if trainer.scope is None:
        return params, training
    shardings = trainer.state_shardings._asdict()

    def placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, params, trainer.shardings), {
        name: jax.tree.map(placed, tree, shardings[name]) for name, tree in training.items()
    }


def fingerprints(run: Run) -> dict[str, str]:
    """What must be the same for a run to resume, by name: SHA-256, in hexadecimal."""
    training, model = run.config.training, run.config.model
    configuration = {
        "model": model.architecture(),
        "param_dtype": model.param_dtype,
        "batch_size": training.batch_size,
        "stride": run.train_loader.stride,
        "order": run.train_loader.order,
        "optimizer": training.optimizer.kind,
    }
    return {
        "data": run.shards.train.fingerprint,
        "tokenizer": run.tokenizer.fingerprint,
        "seed": _digest([training.seeds.data, training.seeds.dropout]),
        "configuration": _digest(configuration),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class Saving:
    """Saves a checkpoint every so many steps, at the end, when interrupted, and at the best validation loss if asked.

    Attributes:
        saved_step: the newest step that is saved or being saved.
        batch_offset: batches that rollbacks have left out so far.
        rollbacks: how often the run has gone back to the newest periodic checkpoint.
        best, latest: the lowest and the latest validation loss, on the same windows.
    """

    def __init__(self, run: Run, trainer: Trainer, meter: Meter, emit: Listener):
        training = run.config.training
        self.every, self.training, self.trainer = in_steps(training.save_every, training.steps), training, trainer
        self.root, self.meter, self.emit = run.folder / CHECKPOINTS, meter, emit
        self.fingerprints = fingerprints(run)
        # Several processes write a step together, and in the same order as they compute.
        self.writer = checkpoint.Writer(self.root, background=training.async_saving and process_count() == 1)
        self.saved_step: int | None = None
        self.batch_offset = self.rollbacks = 0
        self.best: checkpoint.Evaluation | None = None
        self.latest: checkpoint.Evaluation | None = None

    def evaluated(self, step: int, val_loss: float) -> bool:
        """Notes a validation loss; whether it is the lowest so far."""
        self.latest = checkpoint.Evaluation(step, val_loss)
        if self.best is not None and self.best.val_loss <= val_loss:
            return False
        self.best = self.latest
        return True

    def run(self, state: TrainState, last: bool) -> None:
        """Saves `state`. During training, a save that fails is only a warning; at the end it is an error.

        Raises:
            NotFiniteError: this state, or one whose saving has just ended, holds NaN or infinity.
            PolygptError: the last state cannot be saved.
        """
        step = int(state.step)
        if self.saved_step != step:
            periodic = self.every > 0 and step % self.every == 0
            self.rollbacks = 0 if periodic else self.rollbacks
            params, training = split_state(self.trainer, state)
            snapshot = Snapshot(
                step,
                params,
                training,
                self.fingerprints,
                self.batch_offset,
                self.rollbacks,
                tuple(self.meter.recent),
                self.best,
                self.meter.tokens_per_second,
            )
            best = self.best.step if self.training.keep_best and self.best is not None else None
            # A spike may yet lead back to the newest periodic checkpoint, however often the run is interrupted before.
            needed = self.training.on_spike == "rollback" and not periodic and step < self.training.steps
            keep = sys.maxsize if needed else self.training.keep
            self.writer.save(snapshot, Keep(keep, self._keep_every, best))
            self.saved_step = step
        if last:
            self.writer.wait()
        self.report(last)

    def wait(self) -> None:
        """Waits for the save that is being written, and emits what became of it."""
        self.writer.wait()
        self.report()

    @property
    def _keep_every(self) -> int:
        return in_steps(self.training.keep_every, self.training.steps)

    def report(self, last: bool = False) -> None:
        """Emits what became of the saves that have ended since the last call; waits for none.

        Raises:
            NotFiniteError: a state holds NaN or infinity.
            PolygptError: with `last`, if the newest save failed; with several processes, if any did.
        """
        done = self.writer.poll()
        for index, outcome in enumerate(done):
            if not isinstance(outcome, PolygptError):
                self.emit(Saved(outcome.step, outcome.folder))
                self.mark_best()
            elif isinstance(outcome, NotFiniteError) or (last and index == len(done) - 1) or process_count() > 1:
                self.saved_step = None
                raise outcome
            else:
                self.saved_step = None
                self.emit(Note(f"{outcome}; training goes on", warning=True))

    def mark_best(self) -> None:
        """Writes which step is the best, if that is asked for and the step is saved."""
        if not (is_main() and self.training.keep_best and self.best is not None):
            return
        if not checkpoint.exists(self.root, self.best.step):
            return
        text = json.dumps({"step": self.best.step, "val_loss": self.best.val_loss}) + "\n"
        try:
            write_text(self.root / BEST, text)
        except OSError as error:
            self.emit(Note(f"{self.root / BEST}: cannot be written ({error.strerror or error})", warning=True))

    def overfitting(self) -> str | None:
        """What to say at the end if the validation loss was over 1 % lower before."""
        best, latest = self.best, self.latest
        if best is None or latest is None or latest.val_loss <= 1.01 * best.val_loss:
            return None
        said = (
            f"the validation loss was lowest at step {best.step} ({best.val_loss:.4f}; {latest.val_loss:.4f} at step "
            f"{latest.step}): the model has overfitted since; "
        )
        if self.training.keep_best and checkpoint.exists(self.root, best.step):
            return said + f"that step is the model {self.root / 'best'}"
        return said + "training.keep_best=true keeps that step; more data or fewer steps would help"
