"""The loop's warnings: what may not be as the user meant it is said before training."""

import jax
import pytest

from polygpt.recipes import load_recipe
from polygpt.training import Note, train


def warnings_of(**changes):
    events = []
    train(load_recipe("tiny.yaml", {"training.steps": 2, **changes}), "run", listeners=[events.append])
    told = [event.text for event in events if isinstance(event, Note) and event.warning]
    return [text for text in told if "has learned nothing" not in text]  # in so few steps it has not


def test_an_ordinary_run_warns_of_nothing(workdir):
    assert warnings_of(**{"training.schedule.warmup_steps": 1}) == []


@pytest.mark.parametrize(("kind", "warmup"), [("cosine", 2), ("trapezoid", 5), ("cosine", 0.99)])
def test_a_warm_up_as_long_as_the_run_is_warned_of(workdir, kind, warmup):
    (told,) = warnings_of(**{"training.schedule": {"kind": kind, "warmup_steps": warmup}})
    assert "is not shorter than the run (training.steps=2): the learning rate rises to the end" in told


@pytest.mark.parametrize(("every", "said"), [(3, ["every 6 steps"]), (4, [])])
def test_steps_that_are_kept_only_if_they_are_saved_are_said(workdir, every, said):
    told = warnings_of(**{"training.schedule.warmup_steps": 1, "training.save_every": 2, "training.keep_every": every})
    assert [text[-len("every 6 steps") :] for text in told] == said


def test_devices_that_are_not_used_are_said(workdir, monkeypatch):
    device = jax.local_devices()[0]
    monkeypatch.setattr("polygpt.training.facts.jax.local_devices", lambda: [device] * 8)
    (told,) = warnings_of(**{"training.schedule.warmup_steps": 1})
    assert told == "8 cpu devices are here; training uses one, the first (mesh=auto takes all)"


def test_a_vocabulary_far_larger_than_the_tokenizers_is_warned_of(workdir):
    (told,) = warnings_of(**{"training.schedule.warmup_steps": 1, "model.vocab_size": 400})
    assert told.startswith("model.vocab_size=400 is far more than the tokenizer's")


def test_memory_that_is_not_kept_is_said(workdir, monkeypatch):
    monkeypatch.setattr("polygpt.process._not_kept", ["the C library is not glibc"])
    (told,) = warnings_of(**{"training.schedule.warmup_steps": 1})
    assert told == "freed memory is given back in every step, which makes training slower: the C library is not glibc"
