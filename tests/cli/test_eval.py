"""`polygpt eval`: one object on standard output, and every mistake in one to three lines."""

import json

import pytest

ROW = {"ind": 7, "activity_label": "the cat", "ctx": "it sat", "label": 1, "endings": ["on a", "at", "to", "so"]}


@pytest.fixture
def files(run):
    """A text and questions beside `run`, whose characters the run's tokenizer knows."""
    with open("book.txt", "w") as stream:
        stream.write("the cat sat on a mat, and then it ran to see what was there")
    with open("questions.jsonl", "w") as stream:
        for index in range(5):
            row = {**ROW, "ind": index, "activity_label": "a", "ctx": "cat", "label": index % 4}
            stream.write(json.dumps(row) + "\n")


ASK = ["eval", "run", "--json", "--task"]


def test_perplexity_is_one_object_that_says_what_was_done(files, program):
    done = program(*ASK, "perplexity", "--data", "book.txt", "--stride", 4)
    assert (done.code, done.out.count("\n")) == (0, 1), done.err
    result = json.loads(done.out)
    assert set(result) == {
        *("model", "task", "data", "parameters", "nats_per_token", "perplexity", "bits_per_byte", "tokens", "bytes"),
        *("lost_bytes", "context", "stride", "start_token", "documents", "seconds", "weights"),
    }
    assert (result["task"], result["data"], result["bytes"], result["tokens"]) == ("perplexity", "book.txt", 59, 58)
    assert (result["context"], result["stride"]) == (16, 4)
    assert result["start_token"] is None  # characters: this tokenizer has no end of text
    assert result["documents"] == 1
    shorter = json.loads(program(*ASK, "perplexity", "--data", "book.txt", "--no-start", "--context", 8).out)
    assert (shorter["start_token"], shorter["context"], shorter["stride"]) == (None, 8, 4)


def test_documents_are_those_of_lines_or_between_marks(files, program):
    with open("rows.jsonl", "w") as stream:
        stream.write('{"body": "the cat"}\n{"body": "and then"}\n')
    with open("marked.txt", "w") as stream:
        stream.write("the cat\n<|endoftext|>\nand then")
    found = [
        json.loads(program(*ASK, "perplexity", "--data", *words).out)
        for words in (["rows.jsonl", "--text-key", "body"], ["marked.txt", "--documents"])
    ]
    assert [(result["documents"], result["bytes"]) for result in found] == [(2, 15)] * 2
    assert found[0]["nats_per_token"] == found[1]["nats_per_token"]


def test_hellaswag_is_one_object_and_its_choices_are_lines(files, program):
    done = program(*ASK, "hellaswag", "--data", "questions.jsonl", "--limit", 4, "--out", "new/choices.jsonl")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert set(result) == {
        *(
            "model",
            "task",
            "data",
            "parameters",
            "weights",
            "acc",
            "acc_norm",
            "acc_stderr",
            "acc_norm_stderr",
            "n",
            "seconds",
        ),
        "out",
    }
    with open("new/choices.jsonl") as stream:
        lines = [json.loads(line) for line in stream]
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    assert set(lines[0]) == {"index", "label", "choice", "choice_norm", "log_likelihoods"}
    assert result["acc"] == sum(line["choice"] == line["label"] for line in lines) / 4


def test_without_json_there_is_a_line_a_number(files, program):
    done = program("eval", "run", "--task", "perplexity", "--data", "book.txt")
    assert done.code == 0, done.err
    assert "bits per byte" in done.out


def test_a_process_writes_nothing_else_to_standard_output(files, process):
    done = process(*ASK, "hellaswag", "--data", "questions.jsonl")
    assert (done.code, json.loads(done.out)["n"]) == (0, 5), done.err


# What is asked -> what the complaint must say.
MISTAKES = {
    "no data": (["perplexity"], "--task perplexity needs --data FILE: the text"),
    "no data of questions": (["hellaswag"], "--task hellaswag needs --data FILE"),
    "a missing file": (["perplexity", "--data", "none.txt"], "none.txt: no such file"),
    "an empty file": (["perplexity", "--data", "empty.txt"], "empty.txt: is empty"),
    "not UTF-8": (["perplexity", "--data", "bytes.txt"], "bytes.txt: not UTF-8 text (byte 1)"),
    "one token": (["perplexity", "--data", "one.txt", "--no-start"], "one.txt: the text is one token"),
    "a character it does not know": (["perplexity", "--data", "odd.txt"], "odd.txt: character 'f'"),
    "no limit": (["hellaswag", "--data", "questions.jsonl", "--limit", "0"], "limit: must be greater than 0"),
    "a limit of text": (["perplexity", "--data", "book.txt", "--limit", "2"], "--limit does not go with"),
    "a misspelled task": (["helaswag", "--data", "questions.jsonl"], "did you mean 'hellaswag'?"),
    "a stride of questions": (["hellaswag", "--data", "questions.jsonl", "--stride", "2"], "it is of perplexity"),
    "too long a stride": (["perplexity", "--data", "book.txt", "--stride", "17"], "stride=17 must lie in 1..16"),
    "no stride": (["perplexity", "--data", "book.txt", "--stride", "0"], "stride: must be greater than 0"),
    "too long a context": (["perplexity", "--data", "book.txt", "--context", "17"], "the model's context_length"),
    "a text as questions": (["hellaswag", "--data", "book.txt"], "book.txt line 1: not JSON"),
    "rows of a text": (["perplexity", "--data", "book.txt", "--out", "x"], "--out does not go with --task perplexity"),
    "an out that is there": (["hellaswag", "--data", "questions.jsonl", "--out", "book.txt"], "exists already"),
    "a folder as data": (["perplexity", "--data", "."], ".: is a folder; give a file of text"),
    "a folder as questions": (["hellaswag", "--data", "."], ".: is a folder; give HellaSwag's .jsonl file"),
    "documents of questions": (["hellaswag", "--data", "questions.jsonl", "--documents"], "it is of perplexity"),
    "documents without their key": (["perplexity", "--data", "questions.jsonl"], "line 1: no key 'text'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_to_three_lines(files, program, name):
    words, complaint = MISTAKES[name]
    for path, data in (("empty.txt", b""), ("bytes.txt", b"a\xff"), ("one.txt", b"a"), ("odd.txt", "caf\xe9".encode())):
        with open(path, "wb") as stream:
            stream.write(data)
    done = program(*ASK, *words)
    assert (done.code, done.out) == (2, "")
    assert complaint in done.err
    assert 1 <= len(done.complaint) <= 3, done.err


def test_a_model_that_is_not_there_is_named(files, program):
    done = program("eval", "rnu", "--task", "perplexity", "--data", "book.txt")
    assert done.code == 2
    assert "'rnu'" in done.complaint[0]
