"""`polygpt generate`: what reaches the terminal, a pipe, and a script."""

import json
import os
from pathlib import Path

import click
import pytest

from polygpt.cli import COMMANDS, polygpt
from polygpt.cli.generate import generate
from polygpt.kernels import WEIGHT_TYPES

GREEDY = ["--temperature", "0", "--max-new-tokens", "6"]


@pytest.fixture
def text(run, program):
    """What the run continues "the " with, greedily."""
    return json.loads(program("generate", run, "--prompt", "the ", *GREEDY, "--json").out)["text"]


def test_json_has_the_continuation_alone(run, program):
    done = program("generate", run, "--prompt", "the ", *GREEDY, "--json")
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 1)
    result = json.loads(done.out)
    assert set(result) == {"text", "tokens", "finish_reason", "tokens_per_second"}
    assert (len(result["tokens"]), len(result["text"]), result["finish_reason"]) == (6, 6, "length")


def test_every_type_of_weights_can_be_asked_for():
    """The option lists them itself, so that --help need not import the model."""
    option = next(option for option in generate.params if option.name == "weights")
    assert tuple(option.type.choices) == WEIGHT_TYPES


@pytest.mark.parametrize(("bits", "abbreviation"), [("int8", "q8"), ("int4", "q4")])
def test_weights_of_fewer_bits(run, program, text, bits, abbreviation):
    same = json.loads(program("generate", run, "--prompt", "the ", *GREEDY, "--weights", "float32", "--json").out)
    assert same["text"] == text
    few = program("generate", run, "--prompt", "the ", *GREEDY, "--weights", bits, "--json")
    assert (few.code, len(json.loads(few.out)["tokens"])) == (0, 6)
    wrong = program("generate", run, "--prompt", "the ", "--weights", abbreviation)
    assert (wrong.code, wrong.out, wrong.err.count("\n")) == (2, "", 1)
    assert f"did you mean '{bits}'?" in wrong.err
    wrong = program("generate", run, "--prompt", "the ", "--weights", "int9")
    assert (wrong.code, wrong.out, wrong.err.count("\n")) == (2, "", 1)
    assert f"'{bits}'" in wrong.err


def test_the_prompt_and_its_continuation_stream_to_standard_output(run, program, text):
    done = program("generate", run, "--prompt", "the ", *GREEDY)
    assert (done.code, done.out) == (0, f"the {text}\n")
    assert done.err.startswith("6 tokens, ")
    assert done.err.endswith("finished: length\n")


def test_every_prompt_is_continued(run, program, text):
    other = json.loads(program("generate", run, "--prompt", "a cat", *GREEDY, "--json").out)["text"]
    done = program("generate", run, "--prompt", "the ", "--prompt", "a cat", *GREEDY)
    assert (done.code, done.out) == (0, f"the {text}\n\na cat{other}\n")
    assert done.err.count("finished: length\n") == 2
    done = program("generate", run, "--prompt", "the ", "--prompt", "a cat", *GREEDY, "--json")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [(line["prompt"], line["text"]) for line in lines] == [("the ", text), ("a cat", other)]


def test_a_full_context_is_a_stated_reason(run, program):
    done = program("generate", run, "--prompt", "the cat sat on a", "--json")
    assert json.loads(done.out) == {
        "text": "",
        "tokens": [],
        "finish_reason": "context_length",
        "tokens_per_second": None,
    }
    done = program("generate", run, "--prompt", "the cat sat on a")
    assert done.out == "the cat sat on a\n"
    done = program("generate", run, "--prompt", "the cat", "--json")
    assert json.loads(done.out)["finish_reason"] == "context_length"


def test_a_stop_text_ends_it(run, program, text):
    stop = text[2:4]
    done = program("generate", run, "--prompt", "the ", *GREEDY, "--stop", stop, "--json")
    result = json.loads(done.out)
    assert (result["text"], result["finish_reason"]) == (text[: text.index(stop)], "stop")
    done = program("generate", run, "--prompt", "the ", *GREEDY, "--stop", stop)
    assert done.out == f"the {text[: text.index(stop)]}\n"


def test_a_seed_repeats_and_another_differs(run, program):
    def tokens(seed):
        words = ["generate", run, "--prompt", "the ", "--temperature", "2", "--seed", seed, "--json"]
        return json.loads(program(*words).out)["tokens"]

    assert tokens(1) == tokens(1) != tokens(2)


@pytest.mark.parametrize(("data", "code"), [(b"the ", 0), (b"the \xff", 2)])
def test_a_prompt_is_read_from_standard_input_as_utf8(run, text, process, data, code):
    # In a locale that is not UTF-8.
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}
    words = ["generate", run, "--prompt", "-", *GREEDY]
    done = process(*words, input=data, encoding=None, env=environment)
    assert done.code == code, done.err
    if code:
        assert done.out == b""
        assert 1 <= done.err.count(b"\n") <= 2
        assert done.err.startswith(b"polygpt: ")
    else:
        assert done.out == f"the {text}\n".encode()


def test_a_folder_of_runs_names_them(run, program, workdir):
    parent = workdir / "several"
    (parent / "one").mkdir(parents=True)
    (parent / "one/config.yaml").write_text("model: {}")
    done = program("generate", parent, "--prompt", "a")
    assert (done.code, done.out) == (2, "")
    assert f"there are models inside: {parent / 'one'}" in done.err


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("notes.txt", "to train on a text, write own_text data.path=notes.txt"),
        ("notes.csv", "to train on a text, write own_text data.path=notes.csv"),
        ("notes.gguf", "a recipe's name ends in .yaml"),
    ],
)
def test_a_file_of_another_kind_is_no_recipe(program, workdir, name, hint):
    (workdir / name).write_text("a text")
    done = program("train", name, "--out", "new")
    assert (done.code, (workdir / "new").exists()) == (2, False)
    assert done.complaint == [f"{name}: not a recipe; {hint}"]


def test_a_text_of_another_suffix_can_be_renamed(program, workdir):
    (workdir / "notes.md").write_text("a text")
    done = program("train", "tiny.yaml", "data.path=notes.md", "--out", "new")
    assert done.code == 2
    assert "(if it is plain text, rename it to notes.txt)" in done.err


def test_a_mistake_in_a_file_has_its_line(program, workdir):
    path = workdir / "mine.yaml"
    path.write_text("model: {preset: gpt}\ndata: {path: x.txt}\ntraining:\n  stepz: 5 # steps\n")
    done = program("train", path, "--out", workdir / "new")
    assert done.code == 2
    assert f"{path} line 4: training.stepz: no such key; did you mean 'steps'?" in done.err


def test_samples_and_log_probabilities(run, program):
    words = ["generate", run, "--prompt", "the ", "--max-new-tokens", "3", "--json"]
    done = program(*words, "--n", "3", "--seed", "5", "--logprobs", "2")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert (done.code, len(lines)) == (0, 3), done.err
    for number, line in enumerate(lines):
        alone = json.loads(program(*words, "--seed", str(5 + number)).out)
        assert line["tokens"] == alone["tokens"]
        assert len(line["logprobs"]) == len(line["top_logprobs"]) == 3
        assert [len(top) for top in line["top_logprobs"]] == [2, 2, 2]
    assert program("generate", run, "--prompt", "the ", "--logprobs", "2").code == 2


def test_penalties_reach_the_sampler(run, program):
    done = program("generate", run, "--prompt", "a", *GREEDY, "--no-repeat-ngram", "1", "--json")
    tokens = json.loads(done.out)["tokens"]
    assert len(set(tokens)) == len(tokens) == 6
    for value in ("0", "1e300"):
        wrong = program("generate", run, "--prompt", "a", "--repetition-penalty", value)
        assert (wrong.code, wrong.out, wrong.err.count("\n")) == (2, "", 1)
        assert "repetition_penalty" in wrong.err


def test_beam_search_gives_the_best_texts_with_their_scores(run, program):
    words = ["generate", run, "--prompt", "the ", "--max-new-tokens", "5", "--beams", "3"]
    best = json.loads(program(*words, "--json").out)
    done = program(*words, "--n", "3", "--json")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert (done.code, len(lines), lines[0]) == (0, 3, best)
    assert [line["score"] for line in lines] == sorted((line["score"] for line in lines), reverse=True)
    assert program(*words).out == f"the {best['text']}\n"
    shown = program(*words, "--n", "2").out.splitlines()
    assert shown == [f"[{line['score']:.4f}] the {line['text']}" for line in lines[:2]]
    free = json.loads(program(*words, "--length-penalty", "0", "--json").out)
    assert free["score"] == pytest.approx(5 * best["score"], rel=1e-5) or free["tokens"] != best["tokens"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--beams", "0"], "beams"),
        (["--beams", "2", "--n", "3"], "n=3"),
        (["--beams", "2", "--temperature", "0.5"], "temperature"),
        (["--beams", "2", "--seed", "1"], "seed"),
        (["--beams", "2", "--stop", "a"], "stop"),
    ],
)
def test_what_does_not_go_with_beam_search_is_refused(run, program, options, word):
    done = program("generate", run, "--prompt", "the ", *options)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert word in done.err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--length-penalty", "1"], "--length-penalty goes with --beams N"),
        (["--draft", "giant"], "--draft giant: this model has no tokenizer"),
        (["--draft", "gaint"], "--draft gaint: no model 'gaint'; did you mean 'giant'?"),
        (["--schema", "latin.json"], "--schema latin.json: not UTF-8 text (byte 1)"),
        (["--schema", "run"], "'--schema'"),
        (["--regex", "a\udcff"], "--regex: not UTF-8 text (character 1)"),
        (["--stop", "a", "--stop", "\udcff"], "--stop: not UTF-8 text (character 0)"),
        (["--n", "0"], "'--n': 0 is not at least 1"),
        (["--logprobs", "21", "--json"], "'--logprobs': 21 is not in 0..20"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(run, program, options, word):
    Path("latin.json").write_bytes(b"{\xff}")
    done = program("generate", run, "--prompt", "the ", *options)
    assert (done.code, done.out, len(done.complaint)) == (2, "", 1)
    assert word in done.err


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_schema_is_read_from_a_file(run, program, mark):
    pytest.importorskip("llguidance")
    Path("yes.json").write_text(f'{mark}{{"type": "integer", "maximum": 9, "minimum": 0}}', encoding="utf-8")
    words = ["generate", run, "--prompt", "the ", "--max-new-tokens", "2", "--schema", "yes.json"]
    assert "no text matches" in program(*words).err  # the run's tokenizer has no digits


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_text_for_every_option_and_no_formulas(program, command):
    shown = program(command, "--help")
    assert shown.code == 0
    for word in ("RANGE", "x>=", "<=x"):
        assert word not in shown.out
    for parameter in polygpt.get_command(None, command).params if command in ("generate", "chat", "serve") else ():
        assert not isinstance(parameter, click.Option) or parameter.help or parameter.hidden, parameter.name
