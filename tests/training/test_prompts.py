"""Prompts of samples: configured ones, and those that are taken from the held-out text."""

import dataclasses

import pytest

from polygpt.recipes import load_recipe
from polygpt.tokenizers import TokenizerConfig, train_tokenizer
from polygpt.training import Sampled, open_run, train
from polygpt.training.config import SamplingConfig
from polygpt.training.prompts import _beginning, prompts_of


def held_out(run):
    """The end of the text, which a run split by fraction holds out."""
    text = run.tokenizer.decode(run.shards.validation.read(0, run.shards.validation.tokens))
    return text.split("\n")


def test_prompts_are_beginnings_of_lines_of_the_held_out_text(tiny_run):
    run = open_run(tiny_run)
    found = prompts_of(SamplingConfig(every=1, prompts=None), run.tokenizer, run.shards, 64)
    lines = held_out(run)
    assert len(found) == 2
    for prompt in found:
        assert 5 < len(prompt) <= 24
        assert any(line.startswith(prompt) and not line[len(prompt) :][:1].isalpha() for line in lines[1:])


def test_configured_prompts_stay(tiny_run):
    run = open_run(tiny_run)
    assert prompts_of(SamplingConfig(every=1, prompts=("a", "")), run.tokenizer, run.shards, 1) == ("a", "")


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ("", ""),
        ("  two words ", "two words"),
        ("the quick brown fox jumps over", "the quick brown fox"),
        ("the quick brown fox jump and", "the quick brown fox jump"),
        ("x" * 40, "x" * 24),
        ("\ufffdafter a cut character", "after a cut character"),
    ],
)
def test_a_prompt_ends_with_a_word(line, prompt):
    assert _beginning(line) == prompt


class Split:
    """Validation tokens without files."""

    def __init__(self, ids):
        self.ids, self.tokens = ids, len(ids)

    def read(self, start, stop):
        return self.ids[start:stop]


@pytest.mark.parametrize("text", ["", "\n\n\n", "one line without an end", "\N{SNOWMAN}" * 30, "a\nb\nc\n"])
def test_there_is_always_a_prompt_that_can_be_encoded(tiny_run, text):
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), [])
    run = open_run(tiny_run)
    manifest = run.shards.manifest.model_copy(update={"end_of_text": tokenizer.end_of_text})
    shards = dataclasses.make_dataclass("Shards", ["validation", "manifest"])(
        Split(tokenizer.encode_batch([text])[0]), manifest
    )
    found = prompts_of(SamplingConfig(every=1, prompts=None), tokenizer, shards, 10)
    assert found
    assert all(1 <= len(tokenizer.encode(prompt)) <= 5 for prompt in found)


def test_samples_continue_prompts_of_the_text(workdir):
    events = []
    changes = {"training.samples": {"every": 0.5, "prompts": None, "max_new_tokens": 2}, "training.steps": 4}
    train(load_recipe("tiny.yaml", changes), "run", listeners=[events.append])
    lines = held_out(open_run(workdir / "run"))
    samples = [event for event in events if isinstance(event, Sampled)]
    assert [event.step for event in samples] == [2, 2, 4, 4]
    assert all(any(line.startswith(event.prompt) for line in lines) for event in samples)
