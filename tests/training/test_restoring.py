"""Going back before a spike, and interruptions around it: what is computed stays the same, to the bit."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt import checkpoint
from polygpt.errors import PolygptError
from polygpt.model import model_of
from polygpt.recipes import load_recipe
from polygpt.training import Interrupted, RolledBack, Spiked, Stepped, Trainer, open_run, train
from polygpt.training.listeners import RunFiles
from polygpt.training.saving import abstract_parts

CHANGES = {
    "training.steps": 36,
    "training.log_every": 7,
    "training.eval_every": 0,
    "training.save_every": 10,
    "training.on_spike": "rollback",
}


def plant(monkeypatch, where):
    """Adds 50 to the loss of the steps that `where(state, batch)` is true of."""
    original = Trainer.gradients

    def planted(self, state, batch):
        gradients, metrics, effects = original(self, state, batch)
        return gradients, metrics._replace(loss=metrics.loss + jnp.where(where(state, batch), 50.0, 0.0)), effects

    monkeypatch.setattr(Trainer, "gradients", planted)


def legs(out, moments, **changes):
    """Trains in as many legs as there are moments, and one more. A moment is a predicate of (event, events so far).

    Returns the events of each leg, and the interrupted legs' `info.json`.
    """
    seen, saved = [], []
    for index, moment in enumerate([*moments, None]):
        events, stopped = [], []

        def listen(event, moment=moment, events=events, stopped=stopped):
            events.append(event)
            if moment is not None and not stopped and moment(event, events):
                stopped.append(event)
                signal.raise_signal(signal.SIGTERM)

        config = load_recipe("tiny.yaml", CHANGES | changes) if index == 0 else None
        seen.append(events)
        if moment is None:
            train(config, out, resume=index > 0, listeners=[RunFiles(), listen])
        else:
            with pytest.raises(Interrupted):
                train(config, out, resume=index > 0, listeners=[RunFiles(), listen])
            newest = max((out / "checkpoints").glob("step_*"), key=lambda path: path.stat().st_mtime_ns)
            saved.append(json.loads((newest / "info.json").read_text()))
    return seen, saved


def step(number, rolled_back=False):
    """The moment at which a step is done, before or after the rollback."""
    return lambda event, events: (
        isinstance(event, Stepped)
        and event.step == number
        and rolled_back == any(isinstance(e, RolledBack) for e in events)
    )


def final(out):
    """Everything in the newest checkpoint, bit for bit, and its plain values but for the speed."""
    config = open_run(out).config
    saved = checkpoint.newest(out / "checkpoints")
    found = checkpoint.restore(saved, *abstract_parts(Trainer(model_of(config.model), config.training)))
    assert {"optimizer", "step", "guard"} <= found.training.keys()
    info = {name: value for name, value in found.info.items() if name != "tokens_per_second"}
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((found.params, found.training))], info


def losses(legs):
    """The loss of each step as it was computed last."""
    return {event.step: event.loss for events in legs for event in events if isinstance(event, Stepped)}


@pytest.fixture
def bad_batch(workdir, monkeypatch):
    """A spike in the data of step 26, gone once its batch is left out."""
    train(load_recipe("tiny.yaml", CHANGES | {"training.steps": 1}), "first", listeners=[])
    bad = int(open_run(workdir / "first").train_loader.batch(25)["input"].sum())
    plant(monkeypatch, lambda state, batch: batch.input.sum() == bad)


def test_a_run_with_a_rollback_equals_itself_however_it_is_interrupted(workdir, bad_batch):
    (whole,), _ = legs(workdir / "whole", [])
    assert [e for e in whole if isinstance(e, RolledBack)] == [RolledBack(26, 20, 6)]
    wanted = final(workdir / "whole")
    assert wanted[1]["batch_offset"] == 6

    parts, saved = legs(workdir / "after", [step(28, rolled_back=True)])
    assert [(info["step"], info["batch_offset"], info["rollbacks"]) for info in saved] == [(28, 6, 1)]
    assert losses(parts) == losses([whole])
    assert final(workdir / "after") == wanted

    # A checkpoint newer than the one to go back to, and an interruption as the spike is seen.
    def at_spike(event, events):
        return isinstance(event, Spiked)

    parts, saved = legs(workdir / "around", [step(23), at_spike], **{"training.log_every": 1})
    assert [(info["step"], info["batch_offset"]) for info in saved] == [(23, 0), (21, 6)]
    assert losses(parts) == losses([whole])
    assert final(workdir / "around") == wanted


def test_rollbacks_to_one_step_are_counted_across_interruptions(workdir, monkeypatch):
    plant(monkeypatch, lambda state, batch: state.step == 25)
    seen = []

    def listen(event):
        seen.append(event)
        if sum(isinstance(e, RolledBack) for e in seen) == 1 and isinstance(event, Stepped) and event.step == 22:
            signal.raise_signal(signal.SIGTERM)

    config = load_recipe("tiny.yaml", CHANGES | {"training.max_skipped_steps": 2, "training.log_every": 1})
    with pytest.raises(Interrupted):
        train(config, "run", listeners=[listen])
    with pytest.raises(PolygptError, match=r"^step 26: the loss spiked again after 2 rollbacks to step 20; lower"):
        train(None, "run", resume=True, listeners=[listen])
    assert [e for e in seen if isinstance(e, RolledBack)] == [RolledBack(26, 20, 6)] * 2


def test_a_signal_between_two_fetches_does_not_hide_a_spike(workdir, bad_batch, monkeypatch):
    """It comes after step 26, whose loss is not fetched before step 28."""
    from polygpt.training import saving

    report, reports = saving.Saving.report, []

    def signalled(self, last=False):
        if len(reports) == 27:
            signal.raise_signal(signal.SIGTERM)
        reports.append(1)
        report(self, last)

    legs(workdir / "whole", [])
    monkeypatch.setattr(saving.Saving, "report", signalled)
    seen = []
    with pytest.raises(Interrupted):
        train(load_recipe("tiny.yaml", CHANGES), "parts", listeners=[seen.append])
    train(None, "parts", resume=True, listeners=[seen.append])
    assert RolledBack(26, 20, 6) in seen
    assert final(workdir / "parts") == final(workdir / "whole")
