"""Guards: a step that is not finite changes nothing but counters; a spike of the loss is recognised or rolled back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.errors import PolygptError
from polygpt.model import model_of
from polygpt.recipes import load_recipe
from polygpt.training import Batch, RolledBack, Skipped, Spiked, Stepped, Trainer, open_run, train
from polygpt.training.guard import HORIZON, WARM_UP, Guard
from polygpt.training.loss_scale import LossScale, LossScaleConfig

CHANGES = {"training.steps": 32, "training.log_every": 7, "training.eval_every": 0, "training.save_every": 10}


def run(out="run", **changes):
    seen = []
    dotted = {f"training.{name}": value for name, value in changes.items()}
    result = train(load_recipe("tiny.yaml", CHANGES | dotted), out, listeners=[seen.append])
    return result, seen


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


@pytest.fixture
def plant(monkeypatch):
    """`plant(loss, gradient, batches)` adds to both in the steps that `batches(state, batch)` is true of."""
    original = Trainer.gradients

    def call(where, loss=0.0, gradient=0.0):
        def planted(self, state, batch):
            gradients, metrics, effects = original(self, state, batch)
            here = where(state, batch)
            leaves, tree = jax.tree.flatten(gradients)
            leaves[0] = leaves[0] + jnp.where(here, gradient, 0)
            return tree.unflatten(leaves), metrics._replace(loss=metrics.loss + jnp.where(here, loss, 0)), effects

        monkeypatch.setattr(Trainer, "gradients", planted)

    return call


def test_a_nan_in_a_gradient_changes_nothing_and_is_reported(workdir, plant):
    plant(lambda state, batch: (state.step == 4) | (state.step == 5), gradient=jnp.nan)
    _, seen = run(steps=8)
    assert [(event.step, event.in_a_row) for event in of(Skipped, seen)] == [(5, 1), (6, 2)]
    assert [event.step for event in of(Stepped, seen)] == [1, 2, 3, 4, 7, 8]
    assert all(np.isfinite(event.grad_norm) for event in of(Stepped, seen))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_leaves_weights_and_optimizer_to_the_bit(workdir, plant, what):
    plant(lambda state, batch: state.step == 0, **{what: jnp.inf})
    config = load_recipe("tiny.yaml", CHANGES | {"model.vocab_size": 13})
    trainer = Trainer(model_of(config.model), config.training)
    tokens = jnp.ones((4, 16), jnp.int32)
    state = trainer.init()
    after, metrics = jax.jit(trainer.step)(state, Batch(tokens, tokens, jnp.ones((4, 16))))
    jax.tree.map(np.testing.assert_array_equal, after[:2], state[:2])
    assert (int(after.step), int(after.guard.skipped), int(after.guard.in_a_row)) == (1, 1, 1)
    assert (bool(metrics.skipped), float(metrics.update_ratio)) == (True, 0.0)
    later, metrics = jax.jit(trainer.step)(after, Batch(tokens, tokens, jnp.ones((4, 16))))
    assert (int(later.step), int(later.guard.skipped), int(later.guard.in_a_row)) == (2, 1, 0)
    assert 0 < float(metrics.update_ratio) < 1


def test_a_run_that_has_stopped_changes_nothing_even_if_the_next_step_would_be_finite(workdir):
    config = load_recipe("tiny.yaml", CHANGES | {"model.vocab_size": 13, "training.max_skipped_steps": 2})
    trainer = Trainer(model_of(config.model), config.training)
    tokens = jnp.ones((4, 16), jnp.int32)
    state = trainer.init()
    state = state._replace(guard=state.guard._replace(in_a_row=jnp.int32(2)))
    after, metrics = jax.jit(trainer.step)(state, Batch(tokens, tokens, jnp.ones((4, 16))))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert bool(metrics.stopped)


@pytest.mark.parametrize("log_every", [1, 9])
def test_too_many_skipped_steps_stop_the_run_and_keep_the_last_good_one(workdir, plant, log_every):
    """The loss is finite, so the weights are worth keeping; the step does not depend on when metrics are fetched."""
    plant(lambda state, batch: state.step >= 3, gradient=jnp.nan)
    with pytest.raises(PolygptError, match=r"^step 7: .* 4 steps in a row skipped.*\n.*train --resume --out run .*"):
        run(max_skipped_steps=4, log_every=log_every)
    assert [path.name for path in (workdir / "run/checkpoints").iterdir()] == ["step_00000007"]
    plant(lambda state, batch: False)
    seen = []
    train(load_recipe("tiny.yaml", CHANGES), "run", resume=True, listeners=[seen.append])
    assert [event.step for event in of(Stepped, seen)] == list(range(8, 33))


def test_the_statistics_of_the_loss_follow_the_rule():
    guard, losses = Guard.new(), np.linspace(5, 4, WARM_UP) + 0.05 * np.sin(np.arange(WARM_UP))
    for loss in losses:
        assert float(guard.limit(3.0)) == np.inf
        guard = guard.after_step(jnp.float32(loss), guard.limit(3.0))
    assert float(guard.mean) == pytest.approx(losses.mean(), rel=1e-5), "the first losses have equal weights"
    assert float(guard.variance) == pytest.approx(losses.var(), rel=1e-4)
    limit = float(guard.limit(3.0))
    assert limit == pytest.approx(losses.mean() + 3 * losses.std(), rel=1e-4)
    spiked = guard.after_step(jnp.float32(1e6), jnp.float32(limit))
    assert float(spiked.mean) == pytest.approx(float(guard.mean) + (limit - losses.mean()) / (WARM_UP + 1), rel=1e-4)
    for _ in range(10 * HORIZON):
        guard = guard.after_step(jnp.float32(4.0), guard.limit(3.0))
    assert float(guard.limit(3.0)) == pytest.approx(4 + 3 * 0.04, rel=1e-3), "at least 1 % of the mean"
    assert float(guard.limit(None)) == np.inf


def test_a_spike_is_logged_and_the_run_goes_on(workdir, plant):
    plant(lambda state, batch: state.step == 25, loss=50.0)
    _, seen = run()
    (spike,) = of(Spiked, seen)
    assert spike.step == 26
    assert spike.mean < spike.threshold < spike.loss
    assert [event.step for event in of(Stepped, seen)] == list(range(1, 33))
    assert not of(Spiked, run("other", spike_threshold=None)[1])


def test_a_spike_is_rolled_back_and_its_batches_are_left_out(workdir, plant):
    """The spike is in the data: it is gone once its batch is left out, whenever it is noticed."""
    bad = spoiled(workdir, 25)
    plant(lambda state, batch: batch.input.sum() == bad, loss=50.0)
    results = {log_every: run(f"run{log_every}", log_every=log_every, on_spike="rollback") for log_every in (1, 7)}
    for _, seen in results.values():
        assert of(RolledBack, seen) == [RolledBack(26, 20, 6)]
        steps = [event.step for event in of(Stepped, seen)]
        assert steps == [*range(1, 27), *range(21, 33)]
    losses = [[event.loss for event in of(Stepped, seen)] for _, seen in results.values()]
    assert losses[0] == losses[1]
    assert results[1][0].val_loss == results[7][0].val_loss


def spoiled(workdir, index):
    """The sum of the tokens in batch `index` of the run, by which it is recognised."""
    run("first", steps=1)
    return int(open_run(workdir / "first").train_loader.batch(index)["input"].sum())


def test_a_run_that_spikes_after_every_rollback_stops(workdir, plant):
    plant(lambda state, batch: state.step == 25, loss=50.0)
    with pytest.raises(PolygptError, match=r"^step 26: the loss spiked again after 2 rollbacks to step 0; lower"):
        run(on_spike="rollback", max_skipped_steps=2, save_every=0)


def test_the_loss_scale_halves_down_to_one_and_grows_again():
    config = LossScaleConfig(initial=4.0, growth_interval=3)
    scale, found = LossScale.new(config), []
    for finite in [False, False, False, True, True, False, True, True, True, True]:
        scale = scale.next(jnp.asarray(finite), config)
        found.append(float(scale.scale))
    assert found == [2, 1, 1, 1, 1, 1, 1, 1, 2, 2]


def test_float16_skips_overflows_and_finds_its_scale(workdir):
    changes = {"model.compute_dtype": "float16", "training.loss_scale.initial": 2.0**24, "training.steps": 30}
    seen = []
    train(load_recipe("tiny.yaml", CHANGES | changes), "run", listeners=[seen.append])
    skipped, steps = of(Skipped, seen), of(Stepped, seen)
    assert skipped
    assert skipped[0].loss_scale == 2.0**24
    assert all(np.isfinite(event.loss) for event in skipped), "it is the scaled gradients that overflow"
    assert steps[0].loss_scale == 2.0 ** (24 - (steps[0].step - 1))
    assert len(steps) + len(skipped) == 30
