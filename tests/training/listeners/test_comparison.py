"""`polygpt report`: one run's page again, also of an unfinished run, and several runs in one page."""

import json
import shutil
from pathlib import Path

import pytest

from polygpt.training.listeners.comparison import differing
from polygpt.training.listeners.files import up_to
from polygpt.training.listeners.recorded import Recorded


def add(run, *lines):
    with (run / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)


def edit(run, old, new):
    config = run / "config.yaml"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))


@pytest.fixture
def other(run):
    """A second run: unfinished, with twice the batch."""
    shutil.copytree(run, "other")
    (Path("other") / "result.json").unlink()
    edit(Path("other"), "batch_size: 4", "batch_size: 8")
    edit(Path("other"), "steps: 6", "steps: 60")
    return Path("other")


def test_a_report_is_drawn_again_as_it_was(run, program):
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    done = program("report", "run", "--json")
    assert json.loads(done.out) == {"page": "run/report.html"}
    assert (run / "report.html").read_text() == before


def test_a_report_has_the_course_of_training_and_what_happened(run, program):
    skipped = {"event": "skipped", "step": 3, "loss": float("nan"), "grad_norm": 1.0, "in_a_row": 1}
    spiked = {"event": "spiked", "step": 6, "loss": 9.5, "mean": 4.0, "threshold": 6.0}
    add(run, skipped, spiked, {"event": "rolled_back", "step": 6, "to_step": 4, "batches": 2})
    step = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    add(run, step | {"step": 5}, step | {"step": 6})
    assert program("report", "run", "--out", "new/page.html").code == 0
    page = Path("new/page.html").read_text()
    for words in (
        "skipped: not finite (loss nan",
        "loss spike: 9.5000",
        "rolled back to step 4, leaving out 2 batches",
    ):
        assert words in page
    for heading in ("Course of training", "Throughput, utilisation and memory"):
        assert heading in page
    assert Path("new/page.png").read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_run_is_said_to_be(other, program):
    assert program("report", "other").code == 0
    assert "<b>Unfinished:</b> 6 of 60 steps." in (other / "report.html").read_text()


def test_steps_that_were_rolled_back_do_not_count(run):
    add(run, {"event": "rolled_back", "step": 6, "to_step": 4, "batches": 2}, {"event": "step", "step": 5, "loss": 1.0})
    recorded = Recorded.read(run)
    assert [line["step"] for line in recorded.of("step")] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in recorded.abandoned] == [5, 6]


def test_resuming_after_a_rollback_keeps_what_led_to_it():
    back = {"event": "rolled_back", "step": 4, "to_step": 2}
    old = [{"event": "step", "step": step} for step in (1, 2, 3, 4)]
    new = [{"event": "step", "step": step} for step in (3, 4, 5)]
    assert up_to(3, [*old, back, *new]) == [*old, back, new[0]]
    assert up_to(1, [*old, back, *new]) == old[:1]


def test_runs_are_compared_in_one_page(other, program):
    done = program("report", "run", "other", "--json")
    answer = json.loads(done.out)
    assert (answer["page"], answer["plot"], answer["x"]) == ("comparison.html", "comparison.png", "tokens")
    first, second = answer["runs"]
    assert (first["name"], first["finished"], first["steps"]) == ("run", True, 6)
    assert first["val_loss"] == json.loads(Path("run/result.json").read_text())["val_loss"]
    assert (second["finished"], second["of_steps"], second["val_loss"]) == (False, 60, first["val_loss"])
    assert second["settings"] == {"training.steps": 60, "training.batch_size": 8}
    page = Path("comparison.html").read_text()
    assert "6 of 60, unfinished" in page
    assert "training.batch_size" in page
    assert "<script" not in page
    assert Path("comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_person_is_told_each_runs_figures(other, program):
    lines = program("report", "run", "other", "--x", "steps", "--out", "both.html").out.splitlines()
    assert lines[1].endswith("6 of 60 steps, unfinished")
    assert lines[2:] == ["page   both.html", "plot   both.png"]


def test_only_settings_that_differ_are_listed():
    first, second = {"a": {"b": 1, "c": 2}, "d": None}, {"a": {"b": 1, "c": 3, "e": 4}, "d": None}
    assert differing([first, second]) == [{"a.c": 2, "a.e": None}, {"a.c": 3, "a.e": 4}]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nothing"], "nothing: no run here (it has no config.yaml)"),
        (["run", "nothing"], "nothing: no run here (it has no config.yaml)"),
        (["run", "other", "./run"], "run: given twice; name each run once"),
        (["empty"], "empty: no steps are recorded in its metrics.jsonl yet, so there is nothing to show"),
        (["run", "other", "--out", "."], "--out .: the page is a file that ends in .html"),
        (["run", "--x", "tokens"], "--x is for several runs: the report of one is drawn over steps"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_written(other, program, words, complaint):
    shutil.copytree("run", "empty")
    (Path("empty") / "metrics.jsonl").unlink()
    done = program("report", *words)
    assert done.code == 2
    assert done.complaint[0].startswith(complaint)
    assert not Path("comparison.html").exists()
