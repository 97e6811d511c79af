"""`polygpt generate --prompts FILE --out FILE`: what is written, kept, continued and refused."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from polygpt import load
from polygpt.cli import batch
from polygpt.language_model import LanguageModel

LINES = [
    {"prompt": "the ", "id": "first", "max_new_tokens": 5},
    {"prompt": "a cat", "temperature": 0, "seed": 3, "id": 7},
    {"prompt": "the cat sat on a"},  # fills the context
    {"prompt": [1, 2, 3], "logprobs": 2, "top_k": None, "logit_bias": {"4": 1.5}, "stop_tokens": [5]},
    {"prompt": "o", "stop": [" "], "repetition_penalty": 1.5, "seed": 2**32 - 1},
]
OPTIONS = ["--max-new-tokens", "4", "--temperature", "1.2", "--seed", "9"]


def write(lines, path="prompts.jsonl"):
    Path(path).write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


@pytest.fixture
def job(run, program):
    write(LINES)
    return lambda *options: program("generate", run, "--prompts", "prompts.jsonl", "--out", "out.jsonl", *options)


def test_each_prompt_has_its_line_in_order_with_its_own_settings(job, run):
    done = job(*OPTIONS)
    assert (done.code, done.out) == (0, ""), done.err
    *_, progress, last = done.err.splitlines()  # a slow machine says more often how far it is
    assert progress.startswith("5 of 5 prompts, ")
    assert last == "out.jsonl: 5 lines added"
    lines = list(map(json.loads, Path("out.jsonl").read_text().splitlines()))
    lm = load(run, weights="auto")
    for asked, line in zip(LINES, lines, strict=True):
        settings = {"max_new_tokens": 4, "temperature": 1.2, "top_p": 0.95, "seed": 9} | asked
        settings = {name: value for name, value in settings.items() if name not in ("prompt", "id")}
        if "logit_bias" in settings:
            settings["logit_bias"] = {4: 1.5}
        alone = lm.generate(asked["prompt"], **settings)
        assert {key: line.get(key) for key in ("id", "prompt")} == {"id": asked.get("id"), "prompt": asked["prompt"]}
        found = line["text"], line["tokens"], line["finish_reason"]
        assert found == (alone.text, alone.tokens, alone.finish_reason)
        assert line.get("logprobs") == pytest.approx(alone.logprobs)
        assert ("top_logprobs" in line) == ("logprobs" in asked)
    assert len(lines[0]["tokens"]) == 5
    assert [len(top) for top in lines[3]["top_logprobs"]] == [2] * len(lines[3]["tokens"])


def test_constraints_of_the_command_of_a_line_and_a_draft(run, program):
    pytest.importorskip("llguidance")
    write([{"prompt": "the "}, {"prompt": "the ", "choices": ["cat", "mat"]}, {"prompt": "a ", "max_new_tokens": 1}])
    words = ["generate", run, "--prompts", "prompts.jsonl", "--regex", "(at|he)!?", "--max-new-tokens", "4"]
    assert program(*words, "--out", "out.jsonl").code == 0
    texts = [json.loads(line)["text"] for line in Path("out.jsonl").read_text().splitlines()]
    assert re.fullmatch("(at|he)!?", texts[0])
    assert texts[1] in ("cat", "mat")
    assert texts[2] in ("a", "h")
    whole = Path("out.jsonl").read_bytes()
    done = program(*words, "--out", "out.jsonl", "--regex", "cat", "--draft", "lookup")
    assert (done.code, done.err.count("\n")) == (2, 1)  # another expression: other texts
    assert program(*words, "--out", "guessed.jsonl", "--draft", "lookup").code == 0
    assert Path("guessed.jsonl").read_bytes() == whole
    write([{"prompt": "the ", "schema": {"type": "nonsense"}}])
    done = program(*words, "--out", "new.jsonl")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "line 1" in done.err
    assert not Path("new.jsonl").exists()


@pytest.mark.parametrize("cut", [0, 1, 40, None])
def test_an_interrupted_job_goes_on_to_the_same_file(job, cut, monkeypatch):
    """Cut within a line, between two lines, and not at all."""
    assert job().code == 0
    whole = Path("out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    left = whole if cut is None else b"".join(lines[:3]) + lines[3][:cut]
    Path("out.jsonl").write_bytes(left)
    kept = 5 if cut is None else 3
    generated = []
    append = batch._append
    monkeypatch.setattr(batch, "_append", lambda file, line: (generated.append(line), append(file, line)))
    done = job("--json")
    tokens = sum(len(json.loads(line)["tokens"]) for line in lines[kept:])
    counts = {"kept": kept, "added": 5 - kept, "tokens": tokens, "failed": []}
    assert json.loads(done.out) == {"out": "out.jsonl"} | counts
    assert len(generated) == 5 - kept
    assert Path("out.jsonl").read_bytes() == whole


FAILING = {"prompt": "a", "id": "dead end", "grammar": r'start: ("a" | "o") /[^\s\S]/'}


@pytest.mark.parametrize("cut", [0, 1, 2, 4, 5])
def test_a_prompt_that_fails_has_its_error_and_the_others_their_texts(run, program, cut):
    """Whether the job runs through, or is continued before or after the line that failed."""
    pytest.importorskip("llguidance")
    words = ["generate", run, "--prompts", "prompts.jsonl", "--out", "out.jsonl", "--max-new-tokens", "4"]
    write([LINES[0], LINES[1]])
    assert program(*words).code == 0
    texts = Path("out.jsonl").read_bytes().splitlines(keepends=True)
    write([LINES[0], "", FAILING, LINES[1], {"prompt": "o"}, FAILING | {"id": 9}])
    Path("out.jsonl").unlink()
    for _ in range(2):
        done = program(*words)
        assert (done.code, done.out) == (1, "")
        assert done.complaint == [
            "2 of 5 prompts failed (prompts.jsonl lines 3, 6); out.jsonl has an error there instead of a text",
            "line 3: the constraint cannot be met: no text matches it",
        ]
    whole = Path("out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    assert [lines[0], lines[2]] == texts
    failed = json.loads(lines[1])
    assert failed.pop("key")
    assert failed == {"id": "dead end", "prompt": "a", "error": "the constraint cannot be met: no text matches it"}
    Path("out.jsonl").write_bytes(b"".join(lines[:cut]) + (lines[cut][:30] if cut < 5 else b""))
    done = program(*words, "--json")
    assert (done.code, json.loads(done.out)["failed"]) == (1, [3, 6])
    assert Path("out.jsonl").read_bytes() == whole


def test_a_model_whose_logits_are_not_finite_fails_every_prompt(run):
    lm = load(run)
    broken = LanguageModel(lm.config, jax.tree.map(lambda weight: weight * np.nan, lm.params), lm.tokenizer)
    write([{"prompt": "a"}, {"prompt": "the "}])
    done = batch.run_batch(broken, "broken", Path("prompts.jsonl"), Path("out.jsonl"), {})
    assert (list(done.failed), done.added, done.tokens) == ([1, 2], 2, 0)
    assert all("not finite" in json.loads(line)["error"] for line in Path("out.jsonl").read_text().splitlines())


def test_of_many_prompts_that_failed_the_first_are_named(run, program):
    pytest.importorskip("llguidance")
    write([{name: FAILING[name] for name in ("prompt", "grammar")}] * 12)
    done = program("generate", run, "--prompts", "prompts.jsonl", "--out", "out.jsonl")
    assert "12 of 12 prompts failed (prompts.jsonl lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more)" in done.err


def test_a_job_is_continued_however_the_model_s_path_is_written(job, run, program, workdir):
    assert job().code == 0
    whole = Path("out.jsonl").read_bytes()
    (workdir / "link").symlink_to(workdir / "run")
    for spelling in ("./run", "run/", workdir / "run", "link"):
        Path("out.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
        done = program("generate", spelling, "--prompts", "prompts.jsonl", "--out", "out.jsonl")
        assert done.code == 0, done.err
        assert Path("out.jsonl").read_bytes() == whole
    (workdir / "run").rename("other")
    done = program("generate", "other", "--prompts", "prompts.jsonl", "--out", "out.jsonl")
    assert (done.code, "another model" in done.err) == (2, True)


def test_a_preset_continues_token_ids(program, workdir):
    """It has no tokenizer, so there is no text."""
    words = ["generate", "giant", "--prompts", "prompts.jsonl", "--out", "out.jsonl", "--max-new-tokens", "3"]
    write([{"prompt": [1, 2, 3]}, {"prompt": [5]}])
    assert program(*words).code == 0
    lines = list(map(json.loads, Path("out.jsonl").read_text().splitlines()))
    assert [(line["text"], len(line["tokens"])) for line in lines] == [(None, 3), (None, 3)]
    for wrong in ({"prompt": "a"}, {"prompt": [1], "stop": ["a"]}, {"prompt": [1], "regex": "a"}):
        write([{"prompt": [1]}, wrong])
        done = program(*words[:-4], "--out", "new.jsonl")
        assert (done.code, len(done.complaint)) == (2, 1)
        assert "prompts.jsonl line 2: this model has no tokenizer" in done.err


def test_lines_are_written_as_they_are_done(job, monkeypatch):
    append = batch._append

    def interrupt(file, line):
        if line["prompt"] == [1, 2, 3]:
            raise KeyboardInterrupt
        append(file, line)

    with monkeypatch.context() as patch:
        patch.setattr(batch, "_append", interrupt)
        assert job().code == 130
    assert len(Path("out.jsonl").read_text().splitlines()) == 3
    assert job().code == 0
    assert len(Path("out.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("change", ["prompt", "setting", "model", "fewer", "foreign", "foreign line", "other text"])
def test_an_output_of_another_job_is_refused_and_left(job, run, program, change):
    out, options, word = Path("out.jsonl"), [], "line 1: written for another prompt"
    assert job().code == 0
    if change == "prompt":
        write([LINES[0], LINES[1] | {"prompt": "a dog"}, *LINES[2:]])
        word = "line 2: written for another prompt"
    elif change == "setting":
        options = ["--temperature", "0.5"]
    elif change == "model":
        options = ["--weights", "int8"]
    elif change == "fewer":
        write(LINES[:3])
        word = "more lines than prompts.jsonl"
    elif change == "foreign":
        out.write_text('{"mine": 1}\n')
        word = "line 1: not what such a job writes"
    elif change == "foreign line":
        out.write_text('{"mine": 1}')
        word = "line 1: not what such a job writes"
    else:
        out.write_text("my notes\n")
        word = "line 1: not what such a job writes"
    before = out.read_bytes()
    done = job(*options)
    assert (done.code, done.out, len(done.complaint)) == (2, "", 1)
    assert word in done.err
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "not JSON"),
        ("[]", "not an object"),
        ('{"prompt": "\\ud800"}', "not UTF-8"),
        ({}, 'no "prompt"'),
        ({"prompt": 3}, "no prompt"),
        ({"prompt": None}, "no prompt"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": ["a", "b"]}, "a line for each"),
        ({"prompt": "a" * 17}, "17 tokens"),
        ({"prompt": [99]}, "99"),
        ({"prompt": "a", "temprature": 1}, "did you mean 'temperature'?"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "seed": "one"}, "seed"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "stop": [""]}, "stop string is empty"),
        ({"prompt": "a", "stop_tokens": ["a"]}, "stop_tokens"),
        ({"prompt": "a", "chat": 1}, "chat must be"),
        ({"prompt": "a", "chat": True}, "chat template"),
        ({"prompt": "a", "id": [1]}, "id is text"),
        ({"prompt": "a", "id": "first"}, "line 1"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_generated(job, line, word):
    write([LINES[0], "", LINES[1], line])
    done = job()
    assert (done.code, done.out, len(done.complaint)) == (2, "", 1)
    assert "prompts.jsonl line 4: " in done.err
    assert word in done.err
    assert not Path("out.jsonl").exists()


def test_of_many_wrong_lines_the_first_are_named(job):
    write([{}] * 9)
    complaint = job().complaint
    assert len(complaint) == 3
    assert "line 1:" in complaint[0]
    assert complaint[2] == "and 7 more lines are wrong"


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["--prompts", "prompts.jsonl"], "--out"),
        (["--out", "out.jsonl", "--prompt", "a"], "--out goes with --prompts"),
        (["--prompts", "prompts.jsonl", "--out", "out.jsonl", "--prompt", "a"], "not both"),
        (["--prompts", "prompts.jsonl", "--out", "out.jsonl", "--beams", "2"], "--beams"),
        (["--prompts", "prompts.jsonl", "--out", "out.jsonl", "--beams", "2", "--n", "2"], "--n, --beams"),
        (["--prompts", "prompts.jsonl", "--out", "prompts.jsonl"], "file of the prompts"),
        (["--prompts", "prompts.jsonl", "--out", "run"], "run"),
        (["--prompts", "missing.jsonl", "--out", "out.jsonl"], "missing.jsonl"),
        (["--prompts", "empty.jsonl", "--out", "out.jsonl"], "no prompts in it"),
    ],
)
def test_what_does_not_go_together_is_refused(run, program, words, word):
    write(LINES)
    Path("empty.jsonl").write_text("\n\n")
    before = Path("prompts.jsonl").read_bytes()
    done = program("generate", run, *words)
    assert (done.code, done.out, len(done.complaint)) == (2, "", 1), done.err
    assert word in done.err
    assert Path("prompts.jsonl").read_bytes() == before
    assert not Path("out.jsonl").exists()
