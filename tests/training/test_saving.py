"""Saving during training: disks that fill up, saves that fail, and which step is kept as the best."""

import os
import subprocess
from contextlib import suppress

import jax
import pytest

from polygpt import checkpoint
from polygpt.checkpoint import steps as steps_module
from polygpt.errors import PolygptError, RequestError
from polygpt.loading import find, load
from polygpt.recipes import load_recipe
from polygpt.training import Note, Saved, Stepped, train
from polygpt.training.listeners import RunFiles
from polygpt.training.run_folder import read_lines


def warnings_in(events):
    return [event.text for event in events if isinstance(event, Note) and event.warning]


@pytest.mark.parametrize("background", [True, False])
def test_a_save_that_fails_during_training_is_said_and_the_run_goes_on(workdir, monkeypatch, background):
    """The disk is full while step 4 is saved, and has room again at step 6."""
    write = steps_module._write_json

    def full(path, value):
        if value.get("step") == 4:
            raise OSError(28, os.strerror(28), str(path))
        write(path, value)

    monkeypatch.setattr(steps_module, "_write_json", full)
    events = []
    train(load_recipe("tiny.yaml", {"training.async_saving": background}), "run", listeners=[RunFiles(), events.append])
    (told,) = warnings_in(events)
    assert told.endswith("(No space left on device); earlier checkpoints are intact; training goes on")
    assert "step_00000004" in told
    assert [event.step for event in events if isinstance(event, Saved)] == [2, 6]
    assert sorted(p.name for p in (workdir / "run/checkpoints").iterdir()) == ["step_00000002", "step_00000006"]


def test_a_final_save_that_fails_is_an_error_of_one_line(run, program, monkeypatch):
    def full(path, value):
        raise OSError(30, os.strerror(30), str(path))

    monkeypatch.setattr(steps_module, "_write_json", full)
    done = program("train", "--resume", "training.steps=8", "--out", run)
    assert (done.code, len(done.complaint)) == (1, 1)
    assert "step_00000008: cannot be saved (Read-only file system); earlier checkpoints are intact" in done.complaint[0]
    assert checkpoint.newest(run / "checkpoints").step == 6


def fill_up(path):
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_disk_that_fills_up_does_not_end_training_and_a_read_only_one_is_refused(workdir, small_disk):
    settings = {"training.steps": 12, "training.log_every": 1, "training.async_saving": False}
    config, events = load_recipe("tiny.yaml", settings), []
    filler = small_disk / "filler"

    def fill(event):
        events.append(event)
        if isinstance(event, Stepped) and event.step == 3:
            fill_up(filler)
        if isinstance(event, Stepped) and event.step == 8:
            filler.unlink()

    train(config, small_disk / "run", listeners=[RunFiles(), fill])
    told = warnings_in(events)
    assert any("step_00000004: cannot be saved (No space left on device); earlier" in text for text in told), told
    assert sum("metrics.jsonl: cannot be written" in text for text in told) <= 1
    assert checkpoint.newest(small_disk / "run/checkpoints").step == 12
    steps = [line["step"] for line in read_lines(small_disk / "run/metrics.jsonl") if line["event"] == "step"]
    assert steps == [*range(1, 13)], "lines that could not be written came later"

    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    events.clear()
    with pytest.raises(PolygptError, match=r"run: cannot be written \(Read-only file system\)"):
        train(config.replace(**{"training.steps": 16}), small_disk / "run", resume=True, listeners=[events.append])
    assert len(events) == 1, "only the end: nothing was compiled"


# --- The best step -------------------------------------------------------------------------------------------


def test_the_best_step_is_kept_loaded_by_name_and_named_when_the_run_overfits(workdir, monkeypatch):
    from polygpt.training import jobs

    losses = iter([3.0, 2.0, 2.5, 2.6])
    monkeypatch.setattr(jobs, "_mean", lambda sums: next(shown))
    shown = iter([loss for loss in losses for _ in range(2)])
    changes = {"training.keep_best": True, "training.keep": 1, "training.save_every": 0, "training.eval_every": 2}
    events = []
    train(load_recipe("tiny.yaml", changes | {"training.steps": 8}), "run", listeners=[RunFiles(), events.append])
    assert sorted(p.name for p in (workdir / "run/checkpoints").glob("step_*")) == ["step_00000004", "step_00000008"]
    best = load("run/checkpoints/best")
    later = load("run")
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(best.params), jax.tree.leaves(later.params), strict=True))
    same = load("run/checkpoints/step_00000004")
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(best.params), jax.tree.leaves(same.params), strict=True))
    (told,) = warnings_in(events)
    assert "lowest at step 4 (2.0000; 2.6000 at step 8)" in told
    assert "run/checkpoints/best" in told
    with pytest.raises(
        RequestError, match="step_00000005: no such checkpoint; there are: step_00000004, step_00000008"
    ):
        find("run/checkpoints/step_00000005")


def test_the_best_step_needs_evaluations_to_choose_by(program, workdir, snapshot):
    before = snapshot(workdir)
    done = program("train", "tiny.yaml", "training.keep_best=true", "training.eval_every=0", "--out", "run")
    assert (done.code, snapshot(workdir)) == (2, before)
    assert "keep_best needs evaluations during training to choose by; give training.eval_every" in done.err


def test_a_run_without_a_best_step_says_so(run):
    with pytest.raises(RequestError, match=r"this run has marked no best step \(training\.keep_best=true does\)"):
        find("run/checkpoints/best")
