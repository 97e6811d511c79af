"""Periodic jobs: when each is due, in which order, and that what they read is read once."""

import json
from collections import Counter

import pytest

from polygpt import evaluation
from polygpt.data import shards
from polygpt.recipes import load_recipe
from polygpt.training import Evaluated, Measured, Sampled, Saved, Stepped, train
from polygpt.training.jobs import is_due

ROW = {"activity_label": "a", "ctx": "cat", "label": 1, "endings": ["on a", "at", "to", "so"]}
CHANGES = {
    "training.steps": 5,
    "training.eval_every": 2,
    "training.samples": {"every": 2, "prompts": ["the "], "max_new_tokens": 2},
    "training.evaluations": [{"kind": "perplexity", "path": "book.txt", "every": 2}],
    "training.save_every": 2,
    "training.async_saving": False,
}


class Every:
    def __init__(self, every):
        self.every = every


@pytest.mark.parametrize(("every", "steps"), [(0, []), (1, [1, 2, 3, 4]), (3, [3]), (9, [])])
def test_a_job_is_due_every_so_many_steps(every, steps):
    assert [step for step in range(1, 5) if is_due(Every(every), step)] == steps


@pytest.fixture
def events(workdir):
    (workdir / "book.txt").write_text("the cat sat on a mat, and then it ran")
    seen = []
    train(load_recipe("tiny.yaml", CHANGES), "run", listeners=[seen.append])
    return seen


def test_a_checkpoint_comes_after_what_was_measured_at_its_step_and_before_it_at_the_end(events):
    kinds = (Stepped, Evaluated, Measured, Sampled, Saved)
    found = [(type(event), event.step) for event in events if isinstance(event, kinds)]
    between = [Evaluated, Measured, Sampled, Saved]
    expected = []
    for step in range(1, 6):
        expected.append((Stepped, step))
        expected += [(kind, step) for kind in between if step in (2, 4)]
    assert found == [*expected, *((kind, 5) for kind in (Sampled, Saved, Evaluated, Measured))]
    assert [event.full for event in events if isinstance(event, Evaluated)] == [False, False, True]


def test_data_and_evaluation_sets_are_read_once(workdir, monkeypatch):
    (workdir / "book.txt").write_text("the cat sat on a mat, and then it ran")
    (workdir / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    read = Counter()

    def counted(function, name):
        def call(*args, **kwargs):
            read[name(*args)] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(shards, "_check_file", counted(shards._check_file, lambda folder, entry, size: entry.name))
    tasks = evaluation.tasks
    for reader in ("read_text", "read_questions"):
        monkeypatch.setattr(tasks, reader, counted(getattr(tasks, reader), lambda path, *_: path.name))
    asked = [{"kind": "perplexity", "path": "book.txt", "every": 2}, {"kind": "hellaswag", "path": "rows.jsonl"}]
    config = load_recipe("tiny.yaml", {"training.evaluations": asked})
    train(config, "run", listeners=[])
    files = {f"{side}-00000.{kind}" for side in ("train", "validation") for kind in ("tokens", "offsets")}
    assert read == Counter(dict.fromkeys([*files, "book.txt", "rows.jsonl"], 1))
    read.clear()
    train(None, "run", resume=True, listeners=[])
    assert read == Counter(dict.fromkeys([*files, "book.txt", "rows.jsonl"], 1))
