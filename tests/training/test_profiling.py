"""`--profile`: a trace of the steps that were asked for, and mistakes refused before anything is written."""

from pathlib import Path

import pytest

from polygpt.errors import RequestError
from polygpt.training import Profile


@pytest.mark.parametrize("text", ["", "a:b", "3-5", "1:2:3", "1.5:2"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(RequestError, match="not START:STOP, a range of steps such as 20:25"):
        Profile.parse(text)


@pytest.mark.parametrize(("text", "reason"), [("0:2", "counted from 1"), ("5:3", "must not exceed STOP")])
def test_an_impossible_range_is_refused(text, reason):
    with pytest.raises(RequestError, match=reason):
        Profile.parse(text)


def test_a_range_past_the_end_is_refused_before_the_folder_is_made(workdir, program):
    done = program("train", "tiny.yaml", "--out", "run", "--profile", "5:9")
    assert (done.code, done.complaint) == (2, ["--profile 5:9: the run ends after step 6 (training.steps)"])
    assert not Path("run").exists()


def test_steps_that_are_done_already_are_refused(run, program):
    done = program("train", "--resume", "training.steps=8", "--out", "run", "--profile", "6:7")
    assert (done.code, done.complaint) == (2, ["--profile 6:7: 6 steps are done already; start at 7 or later"])


def test_the_steps_are_traced(run, program):
    done = program("train", "--resume", "training.steps=8", "--out", "run", "--profile", "7:8")
    assert done.code == 0
    traces = list(Path("run/profile").rglob("perfetto_trace.json.gz"))
    assert len(traces) == 1
    assert f"profile: open {traces[0]} at ui.perfetto.dev" in done.err
