"""Trackers, each with its real library, offline."""

import json
import sqlite3
import sys

import pytest

from polygpt.errors import RequestError
from polygpt.recipes import load_recipe
from polygpt.training import (
    Ended,
    Evaluated,
    Finished,
    Measured,
    RolledBack,
    RunResult,
    Sampled,
    Started,
    Stepped,
    train,
)
from polygpt.training.listeners import RunFiles, Trackers, trackers

DONE = Finished(RunResult("run", 4, 1.0, 2.0, 3.0, 1234.0, 5.0, 0.5))


def started(folder, names, step=0):
    return Started(load_recipe("demo", {"training.trackers": names}), folder, step, 1_000, {})


def stepped(step, loss=5.0, **more):
    return Stepped(step, loss, 1.0, 0.1, **more)


def session(folder, name, *events, step=0):
    """The warnings of a run that sends these events."""
    notes = []
    listeners = [Trackers(notes.append), RunFiles()]
    for event in [started(folder, [name], step), *events, Ended()]:
        for listener in listeners:
            if not (isinstance(listener, RunFiles) and isinstance(event, Finished)):
                listener(event)
    return notes


def tensorboard_scalars(folder):
    """What TensorBoard shows: each file in turn, where a session's start hides what it will repeat."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            if event.session_log.status == SessionLog.START:
                found = [row for row in found if row[0] < event.step]
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_has_every_metric(tmp_path):
    pytest.importorskip("tensorboardX")
    full = stepped(2, tokens_per_second=9.0, update_ratio=0.5, flops_utilization=0.25, memory_bytes=8, extra={"z": 3.0})
    others = [Evaluated(2, 4.0, 6.0, False), Measured(2, {"book/acc": 0.5, "none": None}), Sampled(2, "a", "b")]
    assert session(tmp_path, "tensorboard", stepped(1), full, *others, DONE) == []
    found = tensorboard_scalars(tmp_path)
    assert {(step, tag): value for step, tag, value in found if tag != "samples/text_summary"} == pytest.approx(
        {(1, f"train/{name}"): value for name, value in (("loss", 5), ("grad_norm", 1), ("learning_rate", 0.1))}
        | {(2, f"train/{name}"): value for name, value in (("loss", 5), ("grad_norm", 1), ("learning_rate", 0.1))}
        | {(2, "train/update_ratio"): 0.5, (2, "speed/tokens_per_second"): 9, (2, "speed/flops_utilization"): 0.25}
        | {(2, "speed/memory_bytes"): 8, (2, "parts/z"): 3, (2, "validation/loss"): 4}
        | {(2, "validation/bits_per_byte"): 6, (2, "book/acc"): 0.5}
    )
    assert any("samples" in tag for _, tag, _ in found)


def test_tensorboard_shows_no_step_twice_after_resuming_and_rolling_back(tmp_path):
    pytest.importorskip("tensorboardX")
    session(tmp_path, "tensorboard", *(stepped(i, float(i)) for i in range(1, 5)))
    back = [RolledBack(4, 2, 2), stepped(3, 70.0), stepped(4, 80.0)]
    session(tmp_path, "tensorboard", stepped(3, 30.0), stepped(4, 40.0), *back, DONE, step=2)
    losses = [(step, value) for step, tag, value in tensorboard_scalars(tmp_path) if tag == "train/loss"]
    assert losses == [(1, 1), (2, 2), (3, 70), (4, 80)]


def test_a_tracker_that_fails_is_warned_of_once_and_left_out(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trackers.TensorBoard, "log", full)
    notes = session(tmp_path, "tensorboard", stepped(1), stepped(2), DONE)
    assert [(note.warning, note.text) for note in notes] == [
        (True, "tensorboard failed ([Errno 28] No space left on device): the run goes on without it")
    ]


def test_a_tracker_that_cannot_start_does_not_stop_the_run(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "tensorboard").write_text("in the way")
    notes = session(tmp_path, "tensorboard", stepped(1), DONE)
    assert len(notes) == 1
    assert "tensorboard failed" in notes[0].text


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_library_is_refused_before_the_folder_is_made(workdir, monkeypatch, name):
    module = trackers.NEEDED[name][0]
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(RequestError, match=rf"training.trackers: {module} is not installed: pip install "):
        train(load_recipe("tiny.yaml", {"training.trackers": [name]}), "run", listeners=[])
    assert not (workdir / "run").exists()


def wandb_records(data):
    """The records of W&B's file: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last piece
            yield Record.FromString(record)
            record = b""


@pytest.mark.parity
def test_wandb_continues_the_same_run_without_repeating_steps(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert session(tmp_path, "wandb", stepped(1), stepped(2), stepped(3, tokens_per_second=9.0)) == []
    again = [stepped(3, tokens_per_second=9.0), stepped(4, tokens_per_second=9.0), DONE]
    assert session(tmp_path, "wandb", *again, step=2) == []
    ids, steps = set(), []
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for record in wandb_records(path.read_bytes()):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                keys = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                steps.append(int(keys["_step"]))
    assert ids == {json.loads((tmp_path / "trackers.json").read_text())["id"]}
    assert steps == [1, 2, 3, 4]


@pytest.mark.parity
def test_trackio_continues_the_same_run_without_repeating_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "db"))
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        del sys.modules[name]  # the folder is read when it is imported
    pytest.importorskip("trackio")
    (tmp_path / "run").mkdir()
    assert session(tmp_path / "run", "trackio", stepped(1), stepped(2), stepped(3, tokens_per_second=9.0)) == []
    again = [stepped(3, tokens_per_second=9.0), stepped(4, tokens_per_second=9.0), DONE]
    assert session(tmp_path / "run", "trackio", *again, step=2) == []
    assert capsys.readouterr().out == ""
    with sqlite3.connect(tmp_path / "db" / "polygpt.db") as database:
        rows = database.execute("select distinct run_name, step from metrics order by step").fetchall()
        count = database.execute("select count(*) from metrics").fetchone()[0]
    identity = json.loads((tmp_path / "run/trackers.json").read_text())["id"]
    assert rows == [(f"run-{identity}", step) for step in (1, 2, 3, 4)]
    assert count == 4
