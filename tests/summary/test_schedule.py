"""The learning rate that `polygpt show` draws: the points, the picture, and the characters of the terminal."""

import json
import re

import pytest
from click.testing import CliRunner

from polygpt.cli.show import show
from polygpt.recipes import load_recipe
from polygpt.summary import schedule_points, schedule_svg


def training(**changes):
    return load_recipe("demo").training.replace(**changes)


def test_points_are_the_schedules_values_from_the_first_step_to_the_last():
    points = schedule_points(training(steps=1000))
    assert (points["kind"], len(points["steps"])) == ("cosine", 120)
    assert (points["steps"][0], points["steps"][-1]) == (0, 999)
    assert points["learning_rate"][0] == pytest.approx(0.001)  # 20 steps of warm-up to 0.02
    assert max(points["learning_rate"]) == pytest.approx(0.02, rel=1e-3)
    assert points["learning_rate"][-1] == pytest.approx(0.0004, rel=1e-2)


@pytest.mark.parametrize(("steps", "kind"), [(1, "constant"), (7, "linear")])
def test_a_short_run_has_a_point_for_each_step(steps, kind):
    points = schedule_points(training(steps=steps, schedule={"kind": kind}))
    assert points["steps"] == list(range(steps))
    assert len(points["learning_rate"]) == steps
    assert schedule_svg(points).count(",") >= steps


def test_the_picture_spans_the_run_and_the_peak():
    svg = schedule_svg({"kind": "x", "steps": [0, 50, 100], "learning_rate": [0.0, 2.0, 1.0]})
    assert 'points="0.0,180.0 320.0,0.0 640.0,90.0"' in svg
    assert not re.search(r"https?://", svg)


def test_show_draws_the_schedule_of_a_recipe_and_of_no_preset(tmp_path):
    page = tmp_path / "page.html"
    words = ["demo", "training.schedule={kind: trapezoid, decay_fraction: 0.5}", "--html", str(page)]
    printed = CliRunner().invoke(show, words).stdout.splitlines()
    start = printed.index("learning rate: trapezoid")
    top, bottom = printed[start + 1], printed[start + 8]
    assert top.startswith("0.02 │⠉⠉⠉")
    assert re.fullmatch(r"   0 │\s{20,}[⠀-⣿]+", bottom)
    assert printed[start + 10].split() == ["step", "0", "1,799"]
    assert "<polyline" in page.read_text()
    facts = json.loads(CliRunner().invoke(show, ["demo", "--json"]).stdout)
    assert len(facts["schedule"]["learning_rate"]) == 120
    assert "learning rate:" not in CliRunner().invoke(show, ["gpt2"]).stdout
