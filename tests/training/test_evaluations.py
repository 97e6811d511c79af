"""`training.evaluations`: metrics along the way and at the end; mistakes are told before anything else."""

import json

import pytest

from polygpt.errors import RequestError
from polygpt.evaluation import encode_text, perplexity
from polygpt.loading import load
from polygpt.recipes import load_recipe
from polygpt.training import train
from polygpt.training.listeners import standard_listeners
from polygpt.training.run_folder import read_lines

TEXT = "the cat sat on a mat, and then it ran to see what was there"
ROW = {"activity_label": "a", "ctx": "cat", "label": 1, "endings": ["on a", "at", "to", "so"]}


@pytest.fixture
def asked(workdir):
    """The recipe with two evaluations, of files in the current folder."""
    (workdir / "book.txt").write_text(TEXT)
    (workdir / "rows.jsonl").write_text((json.dumps(ROW) + "\n") * 4)

    def ask(evaluations, **changes):
        return load_recipe("tiny.yaml", {"data.path": "text.txt", "training.evaluations": evaluations, **changes})

    return ask


BOTH = [
    {"kind": "perplexity", "path": "book.txt", "name": "book", "every": 4},
    {"kind": "hellaswag", "path": "rows.jsonl", "limit": 3},
]


def test_they_are_lines_of_the_metrics_and_of_the_report(asked, workdir, capsys):
    train(asked(BOTH), "run")
    lines = [line for line in read_lines(workdir / "run/metrics.jsonl") if line["event"] == "evaluation"]
    book = {"event", "step", "book/nats_per_token", "book/perplexity", "book/bits_per_byte"}
    questions = {
        "event",
        "step",
        *(f"hellaswag/{name}" for name in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr")),
    }
    assert [(line["step"], set(line)) for line in lines] == [(4, book), (6, book), (6, questions)]
    lm = load("run")
    found = perplexity(lm, encode_text(TEXT, lm.tokenizer, "book"))
    assert lines[1]["book/nats_per_token"] == pytest.approx(found.nats_per_token, rel=1e-5)
    told = capsys.readouterr().err
    assert "step 4: book/nats_per_token " in told
    assert "hellaswag/acc " in told
    page = (workdir / "run/report.html").read_text()
    assert "<th>book/bits per byte</th>" in page
    assert f"<td>{lines[1]['book/perplexity']:.4f}</td>" in page


def test_a_resumed_run_has_the_same_lines_and_none_twice(asked, workdir):
    listeners = standard_listeners(quiet=True)
    train(asked(BOTH), "whole", listeners=listeners)
    train(asked(BOTH, **{"training.steps": 4}), "run", listeners=listeners)
    train(asked(BOTH), "run", resume=True, listeners=listeners)
    train(None, "run", resume=True, listeners=listeners)

    def measured(run):
        lines = read_lines(workdir / run / "metrics.jsonl")
        return [line for line in lines if "book/perplexity" in line and line["step"] == 6]

    assert len(measured("run")) == 1
    assert measured("run")[0]["book/perplexity"] == pytest.approx(measured("whole")[0]["book/perplexity"], rel=1e-2)


@pytest.mark.parametrize(
    ("evaluation", "complaint"),
    [
        ({"kind": "perplexity", "path": "none.txt"}, "training.evaluations.0: none.txt: no such file"),
        ({"kind": "perplexity", "path": "book.txt", "stride": 17}, "training.evaluations.0: stride=17 must lie in"),
        ({"kind": "hellaswag", "path": "book.txt"}, "training.evaluations.0: book.txt line 1: not JSON"),
        ({"kind": "hellaswag", "path": "rows.jsonl", "limit": 0}, "limit: must be greater than 0"),
        ({"kind": "helaswag", "path": "rows.jsonl"}, "no kind 'helaswag'; did you mean 'hellaswag'?"),
        ({"kind": "hellaswag"}, "path: this key is required"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_and_nothing_is_written(asked, workdir, snapshot, evaluation, complaint):
    before = snapshot(workdir)
    with pytest.raises(RequestError) as refused:
        train(asked([evaluation]), "new/run")
    assert complaint in str(refused.value)
    assert snapshot(workdir) == before


def test_two_of_one_name_are_refused(asked):
    with pytest.raises(RequestError, match="two are called 'perplexity'; give one of them another name"):
        asked([{"kind": "perplexity", "path": "book.txt"}, {"kind": "perplexity", "path": "text.txt"}])
