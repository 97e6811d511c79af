"""Training that diverges: nothing that is not finite is saved, resumed from, or reported as done."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from polygpt import checkpoint
from polygpt.errors import PolygptError
from polygpt.loading import load
from polygpt.model import Model
from polygpt.recipes import load_recipe
from polygpt.training import Skipped, Stepped, Trainer, read_config, train
from polygpt.training.listeners import RunFiles
from polygpt.training.run_folder import read_lines
from polygpt.training.saving import abstract_parts

TOO_FAST = {"training.optimizer.learning_rate": 1e3, "training.optimizer.weight_decay": 1e38}  # infinite parameters
MUCH_TOO_FAST = {"training.optimizer.learning_rate": 1e17}  # the parameters stay finite, their products do not


@pytest.mark.parametrize("steps", [1, 12])
def test_a_run_without_one_finite_step_fails_and_saves_nothing(workdir, program, steps):
    changes = TOO_FAST | {"training.steps": steps, "training.eval_every": 0, "training.save_every": 0}
    done = program("train", "tiny.yaml", *(f"{key}={value}" for key, value in changes.items()), "--out", "run")
    assert (done.code, done.out) == (1, "")
    what, advice = done.complaint
    assert what.startswith(f"step {min(steps, 10)}: ")
    assert what.endswith("training diverged (no checkpoint has been saved)")
    assert advice == (
        "go on with a lower learning rate: polygpt train --resume --out run training.optimizer.learning_rate=0.0003"
    )
    assert not (workdir / "run/result.json").exists()
    assert not list((workdir / "run/checkpoints").glob("*"))


def test_a_run_whose_validation_loss_is_not_finite_fails(workdir):
    config = load_recipe("tiny.yaml", MUCH_TOO_FAST | {"training.steps": 1})
    with pytest.raises(PolygptError, match=r"^step 1: validation loss (nan|inf): training diverged") as error:
        train(config, "run", listeners=[RunFiles()])
    assert error.value.exit_code == 1
    assert not (workdir / "run/result.json").exists()
    assert all(line["event"] == "step" for line in read_lines(workdir / "run/metrics.jsonl"))


def test_losses_that_are_not_finite_stop_the_run_and_keep_the_newest_checkpoint(workdir):
    changes = {
        "training.steps": 30,
        "training.save_every": 1,
        "training.eval_every": 0,
        "training.max_skipped_steps": 3,
    }
    seen = []
    with pytest.raises(PolygptError, match=r"^step 4: loss nan.* 3 steps in a row skipped.* checkpoints are intact"):
        train(load_recipe("tiny.yaml", MUCH_TOO_FAST | changes), "run", listeners=[seen.append])
    assert [event.step for event in seen if isinstance(event, Stepped)] == [1]
    assert [(event.step, event.in_a_row) for event in seen if isinstance(event, Skipped)] == [(2, 1), (3, 2), (4, 3)]
    kept = sorted(path.name for path in (workdir / "run/checkpoints").iterdir())
    assert kept == ["step_00000002", "step_00000003"], "the step at which it stopped is not worth keeping"


def test_float16_parameters_train_save_and_resume(workdir, program):
    half = ["model.param_dtype=float16", "model.compute_dtype=float16", "training.save_every=1"]
    done = program("train", "tiny.yaml", *half, "training.steps=1", "--out", "run", "--json")
    assert done.code == 0, done.err
    assert 0 < json.loads(done.out)["val_loss"] < 10
    done = program("train", "--resume", "training.steps=3", "--out", "run", "--json")
    assert (done.code, json.loads(done.out)["steps"]) == (0, 3), done.err
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(load("run").params))


def spoil(run, monkeypatch):
    """Replaces the newest checkpoint by one that holds NaN, which an earlier version saved."""
    config = read_config(run)
    saved = checkpoint.newest(run / "checkpoints")
    found = checkpoint.restore(saved, *abstract_parts(Trainer(Model(config.model), config.training)))
    params = jax.tree.map(lambda leaf: leaf * jnp.nan, found.params)
    with monkeypatch.context() as patch:
        patch.setattr("polygpt.checkpoint.steps.check_finite", lambda *_: None)
        checkpoint.save(run / "checkpoints", dataclasses.replace(found, params=params))


def test_a_checkpoint_that_is_not_finite_is_not_resumed_from(run, program, monkeypatch):
    before = read_lines(run / "metrics.jsonl")
    spoil(run, monkeypatch)
    (run / "result.json").unlink()
    done = program("train", "--resume", "--out", run)
    assert done.code == 0, done.err
    assert "step_00000006/params: " in done.err.replace("\n", "")
    assert "trying the step before it" in done.err
    assert "after step 4" in done.err
    losses = [
        [line["loss"] for line in lines if "loss" in line] for lines in (before, read_lines(run / "metrics.jsonl"))
    ]
    assert losses[0] == losses[1]


def test_a_model_that_is_not_finite_is_no_place_to_start(run, workdir, monkeypatch, program):
    spoil(run, monkeypatch)
    done = program(
        "train", "finetune", "training.initial=run", "data.path=text.txt", "model.context_length=16", "--out", "out"
    )
    assert (done.code, len(done.complaint)) == (2, 1)
    assert "step_00000006/params: " in done.complaint[0]
    assert "not finite (NaN or infinity); start from a model that is whole" in done.complaint[0]
    assert "diverged" not in done.err
    assert not (workdir / "out").exists()  # another try with the same folder is not refused


def test_a_checkpoint_that_is_not_finite_is_not_loaded(run, monkeypatch):
    spoil(run, monkeypatch)
    with pytest.raises(PolygptError, match=r"step_00000006/params: \S+ holds values that are not finite"):
        load("run")


def test_a_model_that_is_finite_but_has_learned_nothing_is_not_reported_as_done(workdir, program):
    settings = ["training.steps=3", "training.eval_every=0", "training.optimizer.learning_rate=1e4"]
    done = program("train", "tiny.yaml", *settings, "--out", "run", "--json")
    result = json.loads(done.out)
    assert done.code == 0
    assert "the model has learned nothing; a lower training.optimizer.learning_rate" in result["warning"]
    assert f"warning: {result['warning']}" in done.err
    assert "ended without learning anything: 3 steps" in done.err
    assert "done:" not in done.err
    assert json.loads((workdir / "run/result.json").read_text())["warning"] == result["warning"]


def test_a_model_that_has_learned_something_is_reported_without_a_warning(run):
    assert json.loads((run / "result.json").read_text())["warning"] is None


def test_a_sample_whose_logits_are_not_finite_is_a_run_that_diverged(workdir):
    settings = {"training.steps": 2, "training.eval_every": 0, "training.samples.every": 1}
    with pytest.raises(
        PolygptError, match=r"^step 1: the logits of a sample are not finite: training diverged"
    ) as error:
        train(load_recipe("tiny.yaml", MUCH_TOO_FAST | settings), "run", listeners=[])
    assert "go on with a lower learning rate: " in str(error.value)
