"""Faults: whatever happens to a run, its newest verified step restores and the run goes on to the same numbers."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from polygpt import checkpoint
from polygpt.errors import RequestError
from polygpt.recipes import load_recipe
from polygpt.training import Evaluated, Interrupted, Note, Started, Stepped, Trainer, read_config, train
from polygpt.training.listeners import RunFiles
from polygpt.training.run_folder import read_lines
from polygpt.training.saving import abstract_parts

TIMED = {"tokens_per_second", "flops_utilization", "memory_bytes", "seconds", "compile_seconds", "run"}
LONG = {"training.steps": 200, "training.save_every": 3, "training.eval_every": 20, "training.log_every": 1}

# Imports once, then forks a child for each start of the run (before JAX has started threads). Each is killed at a
# random moment after its training has begun; the last is left to finish.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
kills, seed = int(sys.argv[1]), int(sys.argv[2])
draw = random.Random(seed)
import grain, orbax.checkpoint
from polygpt.training import Started, train
from polygpt.training.listeners import RunFiles
for kill in range(kills + 1):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        def started(event):
            if isinstance(event, Started):
                os.write(writer, b"!")
        train(None, "run", resume=True, listeners=[RunFiles(), started])
        os._exit(0)
    os.close(writer)
    os.read(reader, 1)
    if kill < kills:
        time.sleep(draw.uniform(0, 1.2))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    done = max([int(path.name[5:]) for path in Path("run/checkpoints").glob("step_*")], default=0)
    print(os.WIFSIGNALED(status), done, flush=True)
"""


def numbers(run):
    lines = read_lines(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def arrays(run):
    """Everything in the newest checkpoint, bit for bit."""
    from polygpt.model import Model

    config = read_config(run)
    saved = checkpoint.newest(run / "checkpoints")
    found = checkpoint.restore(saved, *abstract_parts(Trainer(Model(config.model), config.training)))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((found.params, found.training))]


def prepared(workdir, name, **changes):
    """A run that has been prepared and has not begun."""

    def stop(event):
        if isinstance(event, Started):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="before the first step was saved"):
        train(load_recipe("tiny.yaml", LONG | changes), name, listeners=[stop])
    return workdir / name


def warnings_in(events):
    return [event.text for event in events if isinstance(event, Note) and event.warning]


@pytest.mark.parametrize(("kills", "steps"), [(2, 100), pytest.param(20, 200, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_equals_one_that_was_not(workdir, kills, steps):
    run = prepared(workdir, "run", **{"training.steps": steps})
    whole = shutil.copytree(run, workdir / "whole")
    train(None, whole, resume=True, listeners=[RunFiles()])
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(kills), "3"], capture_output=True, text=True, timeout=60 + 20 * kills
    )
    assert done.returncode == 0, done.stderr
    seen = [line.split() for line in done.stdout.splitlines()]
    assert [killed for killed, _ in seen[:-1]].count("True") >= 1, seen
    assert seen[-1] == ["False", str(steps)], (seen, done.stderr)
    assert numbers(run) == numbers(whole)
    assert arrays(run) == arrays(whole)
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    ("count", "background"),
    [
        (3, True),
        pytest.param(10, True, marks=pytest.mark.slow),
        pytest.param(10, False, marks=pytest.mark.slow),
    ],
)
def test_interruptions_equal_none(workdir, count, background):
    changes = {
        "training.steps": 24,
        "training.save_every": 5,
        "training.log_every": 1,
        "training.async_saving": background,
        "training.eval_every": 4,
    }
    train(load_recipe("tiny.yaml", changes), "whole", listeners=[RunFiles()])
    config, moments = load_recipe("tiny.yaml", changes), sorted(random.Random(1).sample(range(1, 23), count))
    for index, moment in enumerate(moments):

        def stop(event, moment=moment):
            if isinstance(event, Stepped) and event.step == moment:
                signal.raise_signal(signal.SIGTERM)

        with pytest.raises(Interrupted) as error:
            train(config if index == 0 else None, "parts", resume=index > 0, listeners=[RunFiles(), stop])
        assert error.value.exit_code == 143
    train(None, "parts", resume=True, listeners=[RunFiles()])
    assert numbers(workdir / "parts") == numbers(workdir / "whole")
    assert arrays(workdir / "parts") == arrays(workdir / "whole")


def test_every_file_of_a_checkpoint_with_a_flipped_byte_is_named_and_the_step_before_is_resumed(run, program):
    newest = run / "checkpoints/step_00000006"
    for path in sorted(path for path in newest.rglob("*") if path.is_file() and path.name != "manifest.json"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        warned = []
        assert checkpoint.newest(run / "checkpoints", warned.append).step == 4
        assert str(path) in warned[0]
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert checkpoint.newest(run / "checkpoints").step == 6


def test_a_stray_an_empty_and_a_half_copied_step_are_passed_over(run, program):
    steps = run / "checkpoints"
    (steps / "step_00000007").mkdir()
    shutil.copytree(steps / "step_00000006/params", steps / "step_00000008/params")
    (steps / "step_00000009").write_text("x")
    done = program("train", "--resume", "training.steps=8", "--out", run)
    assert done.code == 0, done.err
    told = done.err.replace("\n", "")
    assert all(f"step_0000000{n}" in told for n in (7, 8, 9))
    assert "going on after step 6" in done.err


# --- Two writers, another run --------------------------------------------------------------------------------


def test_a_second_writer_is_refused_before_anything_is_read(run, program, snapshot):
    with checkpoint.folder_lock(run):
        before = snapshot(run)
        done = program("train", "--resume", "training.steps=8", "--out", run)
        assert (done.code, snapshot(run)) == (2, before)
    assert f"run: process {os.getpid()} is training in this folder; wait until it ends" in done.complaint[0]
    assert program("train", "--resume", "training.steps=8", "--out", run).code == 0


def test_a_run_in_training_holds_the_lock(workdir):
    seen = []

    def listen(event):
        if isinstance(event, Stepped) and not seen:
            seen.append(event)
            with pytest.raises(RequestError, match="is training in this folder"):
                train(None, "run", resume=True, listeners=[])

    train(load_recipe("tiny.yaml"), "run", listeners=[listen])
    assert seen
    assert not (workdir / "run/.lock").exists()


@pytest.mark.parametrize("name", ["data", "tokenizer", "seed", "configuration"])
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(run, program, monkeypatch, name):
    from polygpt.training import resume

    own = resume.fingerprints
    monkeypatch.setattr(resume, "fingerprints", lambda run: own(run) | {name: "another"})
    done = program("train", "--resume", "training.steps=8", "--out", run)
    assert done.code == 2
    assert f"step_00000006 was trained with another {name}; bring back" in done.complaint[0]


def test_every_fingerprint_changes_with_what_it_is_of(run):
    """A configuration that was edited by hand escapes the comparison of settings."""
    from polygpt.training import open_run
    from polygpt.training.saving import fingerprints

    def of(old, new):
        path = run / "config.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        found = fingerprints(open_run(run))
        path.write_text(text)
        return [name for name in own if own[name] != found[name]]

    opened = open_run(run)
    own = fingerprints(opened)
    for changes, name in (
        ({"shards": SimpleNamespace(train=opened.shards.validation)}, "data"),
        ({"tokenizer": SimpleNamespace(fingerprint="another")}, "tokenizer"),
    ):
        found = fingerprints(dataclasses.replace(opened, **changes))
        assert [key for key in own if own[key] != found[key]] == [name]
    assert of("batch_size: 4", "batch_size: 8") == ["configuration"]
    assert of("mlp_dim: 32", "mlp_dim: 64") == ["configuration"]
    assert of("  seed: 0\n  init_seed", "  seed: 1\n  init_seed") == ["seed"]
    assert of("save_every: 2", "save_every: 3") == []


def test_another_dtype_is_refused_with_what_to_do(run, program):
    done = program("train", "--resume", "model.param_dtype=bfloat16", "--out", run)
    assert done.code == 2
    assert "this run has model.param_dtype=float32, not bfloat16" in done.complaint[0]
    assert "training.initial=run" in done.complaint[0]


# --- Runs that are done ---------------------------------------------------------------------------------------


def test_a_run_that_is_done_says_so_and_changes_nothing(run, program, snapshot):
    before = snapshot(run)
    done = program("train", "--resume", "--out", run, "--json")
    assert (done.code, snapshot(run)) == (0, before)
    assert json.loads(done.out) == json.loads((run / "result.json").read_text()) | {"band": None}


def test_a_run_whose_result_is_missing_is_evaluated(run):
    (run / "result.json").unlink()
    events = []
    train(None, run, resume=True, listeners=[RunFiles(), events.append])
    assert [event.full for event in events if isinstance(event, Evaluated)] == [True]
    assert (run / "result.json").exists()
