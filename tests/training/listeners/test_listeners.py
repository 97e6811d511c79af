"""What listens to a run: its files, what a person sees, and the report."""

import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from polygpt.recipes import load_recipe
from polygpt.training import (
    Compiled,
    Ended,
    Evaluated,
    Finished,
    Note,
    RolledBack,
    RunResult,
    Sampled,
    Saved,
    Skipped,
    Spiked,
    Started,
    Stepped,
)
from polygpt.training.listeners import Baseline, RunFiles, figures, progress, progress_listener, write_report
from polygpt.training.run_folder import read_lines, read_metrics

RESULT = RunResult("run", 4, 1.0, 2.0, 3.0, 1234.0, 5.0, 0.5)


def started(folder, step=0):
    return Started(load_recipe("demo"), folder, step, 1_000, {"device": "cpu [0]"})


def tell(listener, *events):
    for event in events:
        listener(event)


# --- Files --------------------------------------------------------------------------------------------------


def test_steps_and_evaluations_are_lines_and_samples_too(tmp_path):
    tell(RunFiles(), started(tmp_path), Stepped(1, 5.5, 1.0, 0.1), Stepped(2, 5.0, 1.0, 0.1, 99.0))
    tell(RunFiles(), started(tmp_path, 2), Evaluated(2, 4.0, 6.0, False), Sampled(2, "a", "b\u2028c\x00"))
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"event": "step", "step": 1, "loss": 5.5, "grad_norm": 1.0, "learning_rate": 0.1},
        {"event": "step", "step": 2, "loss": 5.0, "grad_norm": 1.0, "learning_rate": 0.1, "tokens_per_second": 99.0},
        {"event": "validation", "step": 2, "val_loss": 4.0, "val_bits_per_byte": 6.0, "full": False},
    ]
    assert read_lines(tmp_path / "samples.jsonl") == [{"step": 2, "prompt": "a", "text": "b\u2028c\x00"}]


def test_lines_of_an_earlier_version_are_given_their_event(tmp_path):
    lines = [{"step": 1, "loss": 1.0}, {"step": 1, "val_loss": 2.0}, {"step": 1, "book/perplexity": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_metrics(tmp_path)
    assert [line["event"] for line in found] == ["step", "validation", "evaluation"]
    assert [{k: v for k, v in line.items() if k != "event"} for line in found] == lines


def test_lines_after_the_step_where_a_run_goes_on_are_cut(tmp_path):
    events = [Stepped(1, 1.0, 1.0, 0.1), Sampled(1, "a", "\x85"), Stepped(2, 1.0, 1.0, 0.1), Sampled(2, "a", "b")]
    tell(RunFiles(), started(tmp_path), *events)
    tell(RunFiles(), started(tmp_path, 1))
    for name in ("metrics", "samples"):
        assert [line["step"] for line in read_lines(tmp_path / f"{name}.jsonl")] == [1]
    assert not list(tmp_path.glob(".*"))


def test_the_evaluation_that_a_finished_run_has_is_not_written_twice(tmp_path):
    last = Evaluated(2, 4.0, 6.0, True)
    tell(RunFiles(), started(tmp_path), Stepped(2, 1.0, 1.0, 0.1), last)
    tell(RunFiles(), started(tmp_path, 2), last)
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2


def test_lines_that_could_not_be_written_follow_with_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    files = RunFiles()
    with pytest.raises(OSError, match="Is a directory"):  # the loop warns of it, and goes on
        tell(files, started(tmp_path), Stepped(1, 1.0, 1.0, 0.1, 99.0))
    (tmp_path / "metrics.jsonl").rmdir()
    files(Stepped(2, 1.0, 1.0, 0.1, 99.0))
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


# --- What a person sees -------------------------------------------------------------------------------------

EVENTS = [
    Note("data: [a]"),
    Note("odd [b]", warning=True),
    Stepped(10, 5.25, 1.0, 0.1, 2_000.0),
    Stepped(11, 5.0, 1.0, 0.1),
    Evaluated(11, 4.5, 6.5, False),
    Sampled(11, "[/red]\n", "x [bold]y"),
    Saved(11, "run/[c]"),
    Finished(RESULT),
]


def test_without_a_terminal_each_event_is_a_plain_line(tmp_path):
    stream = io.StringIO()
    tell(progress_listener(Console(file=stream, soft_wrap=True, width=60)), started(tmp_path), *EVENTS)
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    assert lines[0] == "training: 1,000 parameters, device cpu [0]"
    assert lines[1:3] == ["data: [a]", "warning: odd [b]"]
    assert re.fullmatch(r"step 10/\d+: loss 5\.2500, 2,000 tokens/s, \d+ s left", lines[3])
    assert lines[4:] == [
        "step 11: validation loss 4.5000, 6.5000 bits per byte (part of the held-out text)",
        "step 11: [/red]⏎x [bold]y",
        "step 11: saved run/[c]",
        "done: 4 steps, 1,234 tokens/s, 5 s",
    ]


def test_what_guards_do_and_the_utilisation_are_shown(tmp_path):
    stream = io.StringIO()
    listener = progress_listener(Console(file=stream, soft_wrap=True, width=60))
    events = [Skipped(1, float("nan"), 2.0, 1), Skipped(2, 9.0, 1.0, 2), Spiked(3, 9.5, 4.0, 6.0)]
    tell(listener, started(tmp_path), *events, RolledBack(3, 1, 2))
    listener(Stepped(10, 5.0, 1.0, 0.1, 2_000.0, flops_utilization=0.416))
    lines = stream.getvalue().splitlines()[1:]
    assert lines[:4] == [
        "step 1: skipped (loss nan, gradient norm 2)",
        "step 2: skipped, 2 in a row (loss 9, gradient norm 1, updated weights not finite)",
        "step 3: loss spike (9.5000, mean 4.0000)",
        "step 3: back to step 1, leaving out 2 batches",
    ]
    assert "2,000 tokens/s (42% of peak FLOPs), " in lines[4]


def test_what_guards_do_is_in_the_metrics(tmp_path):
    tell(
        RunFiles(), started(tmp_path), Stepped(1, 5.0, 1.0, 0.1), Skipped(2, 9.0, 1.0, 1), RolledBack(2, 1, 1), Ended()
    )
    assert [(line["event"], line["step"]) for line in read_lines(tmp_path / "metrics.jsonl")] == [
        ("step", 1),
        ("skipped", 2),
        ("rolled_back", 2),
    ]


def test_the_last_group_of_steps_is_written_even_if_it_is_cut_short(tmp_path):
    tell(RunFiles(), started(tmp_path), Stepped(1, 5.0, 1.0, 0.1), Ended())
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1]


def bar_lines(stream):
    """What a terminal shows in the end: the text after the last control sequence that erases lines."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue().rpartition("\x1b[2K")[2])


def clock(monkeypatch):
    """A clock that the test sets, for the listener alone: event loops in other threads would sleep for hours by it."""
    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def run_of(steps, folder, step=0):
    return Started(load_recipe("demo", {"training.steps": steps}), folder, step, 1_000, {})


@pytest.mark.parametrize("resumed", [0, 100])
def test_the_time_left_goes_by_steps_alone_and_not_by_compiling(tmp_path, monkeypatch, resumed):
    now, stream = clock(monkeypatch), io.StringIO()
    listener = progress_listener(Console(file=stream, soft_wrap=True, width=200))
    listener(run_of(300, tmp_path, resumed))
    now[0] += 500  # compiling
    listener(Compiled(500.0))
    now[0] += 20
    for step in range(1, 10):
        listener(Stepped(resumed + step, 5.0, 1.0, 0.1))
    listener(Stepped(resumed + 10, 5.0, 1.0, 0.1, 99.0))
    left = {0: "9.7 min", 100: "6.3 min"}[resumed]
    assert f"step {resumed + 10}/300: loss 5.0000, 99 tokens/s, {left} left" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (100, "1.7 min"), (5999, "100.0 min"), (6000, "1.7 h")]
)
def test_durations_are_short(seconds, text):
    assert progress._duration(seconds) == text


def test_on_a_terminal_compiling_is_called_so_and_shows_no_steps(tmp_path):
    stream = io.StringIO()
    bar = progress_listener(Console(file=stream, force_terminal=True, width=120))
    bar(run_of(300, tmp_path))
    bar.progress.refresh()
    assert "compiling" in stream.getvalue()
    assert "/300" not in stream.getvalue()
    bar(Compiled(1.0))
    bar.progress.refresh()
    assert "training" in stream.getvalue()
    assert "0/300" in stream.getvalue()
    bar(Ended())


@pytest.mark.parametrize("finished", [True, False])
def test_no_bar_is_left_behind_when_a_run_ends(tmp_path, finished):
    stream = io.StringIO()
    bar = progress_listener(Console(file=stream, force_terminal=True, width=120))
    tell(bar, run_of(300, tmp_path), Compiled(1.0), Stepped(10, 5.25, 1.0, 0.1, 2_000.0))
    bar.progress.refresh()
    assert "10/300" in stream.getvalue()
    tell(bar, *([Finished(RESULT)] if finished else []), Ended())
    assert "300" not in bar_lines(stream)
    assert "━" not in bar_lines(stream)


def test_the_last_samples_are_shown_in_full_at_the_end(tmp_path):
    stream = io.StringIO()
    listener = progress_listener(Console(file=stream, soft_wrap=True, width=60))
    long = "word " * 60
    tell(listener, run_of(4, tmp_path), Sampled(2, "a", long), Sampled(4, "b", f"[x]\n{long}"), Finished(RESULT))
    lines = stream.getvalue().splitlines()
    assert lines[1] == "step 2: a" + long[:159] + "…"
    assert lines[2:] == ["", "b[x]", long, "", "done: 4 steps, 1,234 tokens/s, 5 s"]


@pytest.mark.parametrize("finished", [True, False])
def test_on_a_terminal_a_bar_is_drawn_and_the_cursor_given_back(tmp_path, finished):
    stream = io.StringIO()
    bar = progress_listener(Console(file=stream, force_terminal=True, width=120))
    tell(bar, started(tmp_path), *EVENTS[: None if finished else -1], Ended())
    text = stream.getvalue()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") > 0
    assert "10/1800, loss 5.2500, 2,000 tokens/s, " in text


# --- The report ---------------------------------------------------------------------------------------------


@pytest.fixture
def page(run):
    with (run / "samples.jsonl").open("w") as stream:
        stream.write(json.dumps({"step": 3, "prompt": "<b>", "text": "<script>alert(1)</script>"}) + "\n")
    return write_report(run, [Baseline("gzip", 3.21, "a <note>")]).read_text()


def test_the_report_loads_nothing(page):
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>|"http://purl[^"]*"|"http://www\.w3[^"]*"', "", page)
    assert not re.search(r"https?://|src=|url\((?!#)|@import|<link|<script", without_names)


def test_the_report_escapes_what_the_model_wrote(page):
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "a &lt;note&gt;" in page


def test_the_report_has_the_runs_figures(run, page):
    result = json.loads((run / "result.json").read_text())
    for figure in (f"{result['val_loss']:.4f}", f"{result['val_bits_per_byte']:.4f}", "3.2100", "rmsnorm"):
        assert figure in page
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_shows_the_experts_loads_where_there_are_experts(tmp_path, run, page):
    assert "Load of the experts" not in page
    for name in ("config.yaml", "result.json"):
        (tmp_path / name).write_text((run / name).read_text())
    for step, load in enumerate([None, {0: [0.25] * 4, 2: [0.5, 0.5]}, {0: [0.0, 0.0, 0.5, 0.5], 2: [0.9, 0.1]}], 1):
        with (tmp_path / "metrics.jsonl").open("a") as stream:
            line = {"event": "step", "step": step, "loss": 1.0} | ({} if load is None else {"expert_load": load})
            stream.write(json.dumps(line) + "\n")
    text = write_report(tmp_path).read_text()
    assert "Load of the experts" in text
    assert "expert, after step 3" in text
    assert "expert_load" not in text.partition("Metrics of the model")[2]


def test_the_moving_average_is_unbiased_from_the_start():
    line = np.linspace(7, 3, 101)
    np.testing.assert_allclose(figures.smooth(line)[:-10], line[:-10])
    noisy = line + np.where(np.arange(101) % 2, 0.5, -0.5)
    averages = figures.smooth(noisy)
    assert np.abs(averages - line)[5:-10].max() < 0.06
    for index, window in {
        0: slice(0, 1),
        3: slice(0, 7),
        50: slice(40, 61),
        97: slice(87, 101),
        100: slice(90, 101),
    }.items():
        np.testing.assert_allclose(averages[index], noisy[window].mean())
    assert len(figures.smooth([])) == 0
    np.testing.assert_allclose(figures.smooth([2.0]), [2.0])


def test_the_same_run_gives_the_same_page(run, page):
    assert write_report(run, [Baseline("gzip", 3.21, "a <note>")]).read_text() == page
