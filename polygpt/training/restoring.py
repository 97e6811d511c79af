"""The state that a run starts from, goes on from after an interruption, or goes back to before a spike of the loss."""

from __future__ import annotations

import jax.numpy as jnp

from polygpt.checkpoint import Snapshot
from polygpt.errors import PolygptError
from polygpt.training.events import Listener, Note, RolledBack
from polygpt.training.initial import initial_changes, initial_params
from polygpt.training.meter import Meter
from polygpt.training.resume import restored
from polygpt.training.run_folder import Run
from polygpt.training.saving import Saving
from polygpt.training.state import TrainState
from polygpt.training.step import Trainer


class Restoring:
    """Gives a run's states, and its plain values to the meter and to `saving`."""

    def __init__(self, run: Run, trainer: Trainer, meter: Meter, saving: Saving, emit: Listener):
        self.run, self.trainer, self.meter, self.saving, self.emit = run, trainer, meter, saving, emit
        self.training = run.config.training

    def start(self) -> TrainState:
        """The state before the first step: new weights, or those of `training.initial`."""
        if self.training.initial is None:
            return self.trainer.init()
        changes = initial_changes(self.run.config)
        self.emit(Note(f"weights: from {self.training.initial}" + (f", with {', '.join(changes)}" if changes else "")))
        shardings = None if self.trainer.scope is None else self.trainer.shardings
        return self.trainer.init(initial_params(self.run.config, shardings))

    def newest(self) -> TrainState:
        """The state of the newest checkpoint; the first state if there is none."""
        found = restored(self.run, self.trainer, self.emit)
        if found is None:
            return self.start()
        state, snapshot = found
        self._continue_from(snapshot)
        self.saving.batch_offset, self.saving.rollbacks = snapshot.batch_offset, snapshot.rollbacks
        if self.trainer.is_stopped(state):  # by skipped steps: they are counted anew
            none = jnp.zeros_like(state.guard.in_a_row, device=state.guard.in_a_row.sharding)
            state = state._replace(guard=state.guard._replace(in_a_row=none))
        return state

    def before_spike(self, spike: int) -> TrainState:
        """The state of the newest periodic checkpoint before step `spike`; the batches up to it are left out.

        Only periodic checkpoints count, so that an interruption changes nothing.

        Raises:
            PolygptError: the run has gone back to this state too often.
        """
        every, saving = self.saving.every, self.saving
        saving.rollbacks += 1
        saving.wait()
        found = restored(self.run, self.trainer, self.emit, lambda step: step < spike and every and step % every == 0)
        if found is None:
            state, saving.saved_step, saving.best = self.start(), None, None
            self.meter.recent.clear()
        else:
            state, snapshot = found
            self._continue_from(snapshot)
        step = int(state.step)
        if saving.rollbacks > self.training.max_skipped_steps:
            raise PolygptError(
                f"step {spike}: the loss spiked again after {saving.rollbacks - 1} rollbacks to step {step}; lower "
                "training.optimizer.learning_rate, raise training.spike_threshold, or set training.on_spike=log"
            )
        saving.batch_offset += spike - step
        self.emit(RolledBack(spike, step, spike - step))
        self.meter.restart()
        return state

    def _continue_from(self, snapshot: Snapshot) -> None:
        """Takes over the plain values of a checkpoint."""
        self.meter.recent.clear()
        self.meter.recent.extend(snapshot.recent_losses)
        self.meter.speeds.append(snapshot.tokens_per_second)
        self.saving.saved_step, self.saving.best = snapshot.step, snapshot.best
        self.saving.mark_best()
