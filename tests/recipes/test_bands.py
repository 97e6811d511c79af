"""Bands: a recipe's runs end in them, and a run that trains something else is not compared."""

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_recipe import tiny_recipe

from polygpt.cli import polygpt
from polygpt.errors import RequestError
from polygpt.recipes import as_written, check_band, load_recipe, resume_config, verdict
from polygpt.training import train

TEXT = "\n".join(f"Line {n} says that {n} times {n} is {n * n}." for n in range(400))
RECIPE = tiny_recipe("steps: 4\nbatch_size: 2\nlog_every: 1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe with a band around what it gives, and the run that gave it."""
    folder = tmp_path_factory.mktemp("bands")
    (folder / "text.txt").write_text(TEXT)
    (folder / "plain.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        events = []
        result = train(load_recipe("plain.yaml"), "plain", listeners=[events.append])
    held_out = next(event.held_out for event in events if hasattr(event, "held_out"))
    for name, middle, fingerprint in (
        ("inside", result.val_loss, held_out),
        ("outside", result.val_loss + 1, held_out),
        ("other", result.val_loss, "0" * 12),
    ):
        band = f'{{val_loss: {middle}, tolerance: 0.1, seeds: 5, held_out: "{fingerprint}"}}'
        (folder / f"{name}.yaml").write_text(f"{RECIPE}expected: {band}\n")
    (folder / "both.yaml").write_text(
        f"{RECIPE}expected: {{val_loss: {result.val_loss + 1}, tolerance: 0.1, seeds: 5}}\n"
        f"short: {{training: {{steps: 3}}, expected: {{val_loss: {result.val_loss}, tolerance: 0.2, seeds: 5}}}}\n"
    )
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def invoke(*words):
    return CliRunner().invoke(polygpt, ["train", *words])


def refusal(*words):
    """The message with which `polygpt train` refuses."""
    error = invoke(*words, "--check").exception
    assert isinstance(error, RequestError)
    return str(error)


def test_a_run_in_its_band_passes():
    outcome = invoke("inside.yaml", "--out", "good", "--check", "--json")
    assert outcome.exit_code == 0
    answer = json.loads(outcome.stdout)
    assert answer["band"]["within"]
    assert answer["band"]["low"] < answer["val_loss"] < answer["band"]["high"]


def test_a_run_outside_its_band_fails_and_is_complete():
    outcome = invoke("outside.yaml", "--out", "bad", "--check")
    assert outcome.exit_code == 1
    assert "OUTSIDE the expected band" in outcome.stdout
    assert json.loads(Path("bad/result.json").read_text())["steps"] == 4


def test_without_check_the_band_is_only_shown():
    outcome = invoke("outside.yaml", "--out", "shown")
    assert outcome.exit_code == 0
    assert "OUTSIDE the expected band" in outcome.stdout


def test_another_text_is_refused_before_the_first_step_and_can_be_trained_on_without_check(folder):
    assert "another held-out text (fingerprint 000000000000" in refusal("other.yaml", "--out", "foreign")
    assert not (folder / "foreign/metrics.jsonl").exists()
    assert invoke("--resume", "--out", "foreign").exit_code == 0


def test_a_recipe_without_a_band_and_a_run_that_trains_something_else_are_refused(folder):
    assert "plain.yaml states no expected validation loss" in refusal("plain.yaml", "--out", "no")
    changed = refusal("inside.yaml", "training.steps=5", "model.embed_dim=32", "--out", "no")
    assert "changes model.embed_dim 16 → 32, training.steps 4 → 5" in changed
    assert not (folder / "no").exists()


@pytest.mark.parametrize(
    ("changes", "stays"),
    [
        ({"training.seed": 3}, True),
        ({"training.save_every": 2, "training.samples.every": 2, "training.eval_every": 2}, True),
        ({"data.path": "moved.txt"}, True),
        ({"training.steps": 5}, False),
        ({"training.optimizer.learning_rate": 1e-3}, False),
        ({"model.dropout": 0.1}, False),
        ({"tokenizer.kind": "byte"}, False),
    ],
)
def test_a_band_stays_where_the_same_is_trained(changes, stays):
    assert (load_recipe("inside.yaml", changes).expected is not None) is stays


def test_a_short_form_has_a_band_of_its_own():
    full, short = as_written("both.yaml"), as_written("both.yaml", short=True)
    assert (full.expected.tolerance, short.expected.tolerance) == (0.1, 0.2)
    outcome = invoke("both.yaml", "--short", "--out", "short", "--check", "--json")
    assert outcome.exit_code == 0
    band = json.loads(outcome.stdout)["band"]
    assert band["within"]
    assert band["high"] == pytest.approx(short.expected.val_loss + 0.2)
    assert load_recipe("both.yaml", {"training.seed": 1}, short=True).expected == short.expected
    assert "changes training.steps 3 → 4" in refusal("both.yaml", "--short", "training.steps=4", "--out", "no")


def test_the_band_of_a_full_form_does_not_apply_to_its_short_form(folder):
    both = (folder / "both.yaml").read_text()
    (folder / "full.yaml").write_text(both.partition(", expected: {val_loss")[0] + "}\n")  # of the short form
    assert as_written("full.yaml").expected is not None
    assert "states no expected validation loss" in refusal("full.yaml", "--short", "--out", "no")


def test_a_run_resumed_with_other_settings_has_no_band(tmp_path):
    train(load_recipe("inside.yaml", {"training.steps": 4}), tmp_path / "run", listeners=[])
    assert resume_config(tmp_path / "run", None, {}).expected is not None
    assert resume_config(tmp_path / "run", None, {"training.steps": 6}).expected is None
    result = train(resume_config(tmp_path / "run", None, {"training.steps": 6}), tmp_path / "run", resume=True)
    assert verdict(as_written("plain.yaml"), result) is None


def test_the_verdict_is_at_the_edges_of_the_band():
    config = as_written("inside.yaml")
    middle, reach = config.expected.val_loss, config.expected.tolerance
    for loss, within in ((middle - reach, True), (middle - reach - 1e-6, False), (middle + reach + 1e-6, False)):
        assert verdict(config, {"val_loss": loss}).within is within


def test_a_band_is_from_at_least_five_seeds(tmp_path):
    (tmp_path / "few.yaml").write_text(RECIPE + "expected: {val_loss: 2.0, tolerance: 0.1, seeds: 4}\n")
    with pytest.raises(RequestError, match=r"expected\.seeds.*5"):
        load_recipe(str(tmp_path / "few.yaml"))


def test_check_band_accepts_a_run_that_has_one():
    config = as_written("inside.yaml")
    check_band("inside.yaml", config, config)
    assert dataclasses.is_dataclass(verdict(config, {"val_loss": 1.0}))
