"""Going on: to the same numbers, bit for bit, and only with the same run."""

import json
import signal

import jax
import numpy as np
import pytest

from polygpt import checkpoint
from polygpt.errors import RequestError
from polygpt.recipes import load_recipe
from polygpt.training import Ended, Interrupted, Skipped, Stepped, read_config, train
from polygpt.training.listeners import RunFiles
from polygpt.training.run_folder import read_lines
from polygpt.training.saving import abstract_parts

TIMED = {"tokens_per_second", "flops_utilization", "memory_bytes", "seconds", "compile_seconds", "run"}


def stop_after(step):
    """A listener that interrupts the process as Ctrl-C would, once `step` is done."""

    def listen(event):
        if isinstance(event, (Stepped, Skipped)) and event.step == step:
            signal.raise_signal(signal.SIGINT)

    return listen


def bytes_of_arrays(run):
    """Everything in the newest checkpoint, bit for bit."""
    from polygpt.model import Model
    from polygpt.training import Trainer

    config = read_config(run)
    saved = checkpoint.newest(run / "checkpoints")
    found = checkpoint.restore(saved, *abstract_parts(Trainer(Model(config.model), config.training)))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((found.params, found.training, found.step))]


def numbers(run):
    lines = read_lines(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


EXTRAS = {
    "adamw": {},
    # The average has 32 bits, and cannot be had from the weights that are evaluated, which have 16.
    "muon_ema": {"training.optimizer.kind": "muon", "training.ema_decay": 0.9, "model.param_dtype": "bfloat16"},
    "schedule_free": {"training.optimizer.kind": "schedule_free", "training.schedule.kind": "constant"},
    # The first steps overflow, and the scale grows again before and after the interruptions.
    "float16": {"model.compute_dtype": "float16", "training.loss_scale": {"initial": 2.0**20, "growth_interval": 2}},
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_interrupted_run_goes_on_to_the_same_numbers(workdir, extra):
    changes = {"training.log_every": 1, "training.steps": 8} | EXTRAS[extra]
    config = load_recipe("tiny.yaml", changes)
    assert config.model.dropout > 0
    whole = train(config, "whole", listeners=[RunFiles()])
    events = []
    with pytest.raises(Interrupted):
        train(config, "parts", listeners=[RunFiles(), stop_after(3), events.append])
    assert [event for event in events if event == Ended()] == events[-1:]
    assert checkpoint.newest(workdir / "parts/checkpoints").step == 3, "saved where it was interrupted"
    with pytest.raises(Interrupted):
        train(None, "parts", resume=True, listeners=[RunFiles(), stop_after(5)])
    parts = train(None, "parts", resume=True, listeners=[RunFiles()])
    assert numbers(workdir / "parts") == numbers(workdir / "whole")
    assert len(numbers(workdir / "whole")) == 8 + 3
    assert bytes_of_arrays(workdir / "parts") == bytes_of_arrays(workdir / "whole")
    assert {k: v for k, v in vars(parts).items() if k not in TIMED} == {
        k: v for k, v in vars(whole).items() if k not in TIMED
    }


def test_dropout_and_batches_differ_from_step_to_step_and_seed_to_seed(workdir):
    losses = set()
    for seed in (0, 1):
        train(load_recipe("tiny.yaml", {"training.seed": seed}), f"seed{seed}", listeners=[RunFiles()])
        losses |= {line["loss"] for line in numbers(workdir / f"seed{seed}") if "loss" in line}
    assert len(losses) == 12


def test_a_finished_run_is_left_as_it_is(run, program):
    before = numbers(run), bytes_of_arrays(run)
    done = program("train", "--resume", "--out", run, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert (result["steps"], result["val_loss"]) == (6, before[0][-1]["val_loss"])
    assert (numbers(run), bytes_of_arrays(run)) == before


def test_a_run_goes_on_for_more_steps_and_remembers_it(run, program):
    done = program("train", "--resume", "training.steps=8", "--out", run, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["steps"] == read_config(run).training.steps == 8
    steps = [line["step"] for line in numbers(run) if "loss" in line]
    assert steps == [*range(1, 9)]


def test_lines_after_the_checkpoint_come_again_once(run, program):
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "loss": 99.0}\n{"step": 8, "lo')
    assert program("train", "--resume", "training.steps=8", "--out", run).code == 0
    lines = numbers(run)
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 9)]
    assert all(line.get("loss") != 99.0 for line in lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.num_layers=2", "this run has model.num_layers=1, not 2"),
        ("model.embed_scale=2.0", "this run has model.embed_scale=1.0, not 2.0"),
        ("model.norm={kind: layernorm}", "this run has model.norm="),
        ("tokenizer.kind=byte", "this run has tokenizer.kind=char, not byte"),
        ("data.path=tiny.yaml", "this run has data.path="),
        ("data.stride=1", "this run has data.stride=None, not 1"),
        ("training.batch_size=8", "batch_size"),
        ("training.seed=1", "seed"),
        ("training.optimizer={kind: muon}", "optimizer"),
    ],
)
def test_another_model_data_or_order_is_refused_by_name(run, workdir, program, snapshot, change, message):
    before = snapshot(workdir)
    done = program("train", "--resume", change, "--out", run)
    assert (done.code, done.out) == (2, "")
    assert message in "\n".join(done.complaint)
    assert len(done.complaint) <= 3
    assert snapshot(workdir) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["training.steps=8", "model.scan_layers=true"], "changed: model.scan_layers None → True"),
        (
            ["training.steps=8", "model.attention.implementation=xla"],
            "changed: model.attention.implementation auto → xla, training.steps 6 → 8",
        ),
        (["training.steps=8", "model.dropout=0.2"], "changed: model.dropout 0.1 → 0.2"),
        (
            ["training.steps=8", "training.optimizer.learning_rate=0.0005"],
            "changed: training.steps 6 → 8, training.optimizer.learning_rate 0.0003 → 0.0005",
        ),
    ],
)
def test_how_a_model_is_computed_and_trained_may_change_and_is_said(run, program, changes, said):
    done = program("train", "--resume", *changes, "--out", run)
    assert done.code == 0, done.err
    assert said in done.err
    lines = numbers(run)
    assert [line["step"] for line in lines if line["event"] == "step"] == [*range(1, 9)]
    key, _, value = said.rpartition(", ")[2].removeprefix("changed: ").partition(" ")
    node = read_config(run).to_dict()
    for step in key.split("."):
        node = node[step]
    assert str(node) == value.rpartition(" ")[2]


def test_a_run_resumed_as_it_was_says_nothing_of_changes(run, program):
    done = program("train", "--resume", "--out", run)
    assert "changed" not in done.err
    assert "already done: 6 steps; give more (training.steps=12)" in done.err


def test_initial_values_batches_and_dropout_have_seeds_of_their_own(workdir):
    def losses(name, **changes):
        train(load_recipe("tiny.yaml", changes), name, listeners=[RunFiles()])
        return [line["loss"] for line in numbers(workdir / name) if line["event"] == "step"]

    seed, init, data = "training.seed", "training.init_seed", "training.data_seed"
    plain = losses("plain", **{"model.dropout": 0.0, seed: 1})
    assert losses("named", **{"model.dropout": 0.0, seed: 5, init: 1, data: 1}) == plain
    assert losses("init", **{"model.dropout": 0.0, seed: 1, init: 2}) != plain
    assert losses("data", **{"model.dropout": 0.0, seed: 1, data: 2}) != plain
    assert losses("dropout", **{seed: 5, init: 1, data: 1}) != losses("dropout1", **{seed: 1, init: 1, data: 1})


def test_a_recipe_given_again_must_be_the_runs(run, program):
    assert program("train", "tiny.yaml", "--resume", "--out", run).code == 2  # its data.path is another spelling
    path = read_config(run).data.path
    assert program("train", "tiny.yaml", f"data.path={path}", "--resume", "--out", run).code == 0


def test_a_recipe_given_again_does_not_ask_for_the_text_that_the_run_has(run, workdir, program):
    text = (workdir / "tiny.yaml").read_text()
    (workdir / "asks.yaml").write_text(text.replace("path: text.txt", "path: FILE"))
    assert "data.path is required" in program("train", "asks.yaml", "--out", "new").err
    done = program("train", "asks.yaml", "training.steps=7", "--resume", "--out", run)
    assert done.code == 0, done.err


def test_a_damaged_newest_step_is_named_and_the_one_before_goes_on_to_the_same_numbers(run, program):
    before = numbers(run), bytes_of_arrays(run)
    damaged = next((run / "checkpoints/step_00000006/params/d").iterdir())
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    done = program("train", "--resume", "--out", run)
    assert done.code == 0, done.err
    assert str(damaged) in done.err.replace("\n", "")
    assert "going on after step 4" in done.err
    assert (numbers(run), bytes_of_arrays(run)) == before


def test_fewer_steps_than_are_done_are_refused(run, program, snapshot):
    before = snapshot(run)
    done = program("train", "--resume", "training.steps=3", "--out", run)
    assert done.code == 2
    assert "training.steps=3" in done.complaint[0]
    assert snapshot(run) == before


def test_a_new_run_needs_a_configuration(tmp_path):
    with pytest.raises(RequestError, match="load_recipe"):
        train(None, tmp_path / "run")
