"""HellaSwag: rows as lm-evaluation-harness reads them, choices from plain sums, and every malformed row by its line."""

import json
import math

import numpy as np
import pytest

from polygpt.errors import RequestError
from polygpt.evaluation import choose_endings, encode_questions, read_questions
from polygpt.evaluation.pairs import encode_pairs
from polygpt.loading import build
from polygpt.presets import preset
from polygpt.tokenizers import TokenizerConfig, train_tokenizer

CLEANED = {
    "ind": 3,
    "activity_label": "Cooking",
    "ctx": "A man cuts an onion. he",
    "label": 2,
    "endings": ["flies away.", "cries über it", "puts it in a pan.", "is an onion."],
}
RAW = {
    **CLEANED,
    "ctx_a": "[header] How to cook [title] Begin. [step] A man cuts an onion.",
    "ctx_b": "he and Bob",
    "endings": ["[substeps] Fly  away.", " cries.", "puts it in [a] pan. [title] Go", "is."],
    "split": "val",
}


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="module")
def lm():
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), ["text"])
    config = preset(
        "gpt2", num_layers=1, embed_dim=16, context_length=64, **{"attention.num_heads": 2, "init_std": 0.5}
    )
    exact = config.replace(vocab_size=tokenizer.vocab_size, compute_dtype="float32")
    return build(exact, tokenizer=tokenizer)


def test_a_raw_row_is_cleaned_as_the_harness_does(write):
    (question,) = read_questions(write(RAW))
    # The rest of ctx_b is made small, and a [title] after a full stop gives two: so the harness has it.
    assert question.context == "Cooking: How to cook. Begin. A man cuts an onion. He and bob"
    assert question.endings == (" Fly away.", "cries.", "puts it in pan.. Go", "is.")
    assert (question.index, question.label, question.line) == (3, 2, 1)


def test_a_cleaned_row_is_taken_as_it_stands(write):
    (question,) = read_questions(write("\n", CLEANED))
    assert question.context == "Cooking: A man cuts an onion. he"
    assert (question.endings, question.line) == (tuple(CLEANED["endings"]), 2)


def test_the_limit_counts_questions_and_reads_no_further(write):
    assert [q.index for q in read_questions(write(CLEANED, {**CLEANED, "ind": 4}, "broken\n"), limit=2)] == [3, 4]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("[1]\n", "an object is needed, not list"),
        ("{\n", "not JSON"),
        ({**CLEANED, "label": ""}, "'label' must be 0 to 3, not ''"),
        ({**CLEANED, "label": 4}, "'label' must be 0 to 3, not 4"),
        ({**CLEANED, "label": True}, "'label' must be 0 to 3"),
        ({**CLEANED, "endings": ["a"]}, "'endings' must be a list of 4 texts"),
        ({**CLEANED, "endings": ["a", "b", "c", 1]}, "'endings' must be a list of 4 texts"),
        ({**CLEANED, "endings": ["a", "b", "", "c"]}, "ending 2 is empty"),
        ({**CLEANED, "ctx": None}, "'ctx' must be a text, not None"),
        ({**CLEANED, "ctx_a": "a"}, "'ctx_b' must be a text"),
        ({"ind": 1}, "'endings' must be"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(write, row, complaint):
    with pytest.raises(RequestError) as refused:
        read_questions(write(CLEANED, row))
    assert f"rows.jsonl line 2: {complaint}" in str(refused.value)


def test_a_file_without_rows_is_refused(write):
    with pytest.raises(RequestError, match="no questions in it"):
        read_questions(write("\n"))


def test_the_choice_is_the_likeliest_and_by_bytes_the_likeliest_a_byte(write, lm):
    path = write(*({**CLEANED, "ind": index, "label": index % 4} for index in range(6)))
    questions = read_questions(path)
    pairs = encode_questions(questions, lm.tokenizer, lm.config.context_length, path)
    result, choices = choose_endings(lm, questions, pairs)
    sums = []
    for ending in questions[0].endings:
        context, whole = questions[0].context, f"{questions[0].context} {ending}"
        sums.append(-float(np.sum(np.asarray(lm.nll(whole))[len(context) - 1 :])))
    np.testing.assert_allclose(choices[0].log_likelihoods, sums, rtol=1e-5)
    best = int(np.argmax(sums))
    normalised = int(np.argmax(np.array(sums) / [len(e.encode()) for e in CLEANED["endings"]]))
    assert {(choice.choice, choice.choice_norm) for choice in choices} == {(best, normalised)}
    share = sum(index % 4 == best for index in range(6)) / 6
    assert result.acc == pytest.approx(share)
    assert result.acc_stderr == pytest.approx(math.sqrt(share * (1 - share) / 5))
    assert result.n == 6


def test_a_single_question_has_no_standard_error(write, lm):
    path = write(CLEANED)
    questions = read_questions(path)
    result, _ = choose_endings(lm, questions, encode_questions(questions, lm.tokenizer, 64, path))
    assert (result.n, result.acc_stderr, result.acc_norm_stderr) == (1, None, None)


def test_an_ending_longer_than_the_context_is_named(write, lm):
    path = write(CLEANED, {**CLEANED, "endings": ["a", "b", "c", "d" * 70]})
    with pytest.raises(RequestError, match=r"line 2: 71 tokens are to be scored at once, more than .* context of 64"):
        encode_questions(read_questions(path), lm.tokenizer, 64, path)


def test_spaces_before_a_continuation_belong_to_it():
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), ["text"])
    (pair,) = encode_pairs([("ab  ", "c")], tokenizer.encode_batch, 8, ["here"])
    assert pair == (tokenizer.encode("ab"), tokenizer.encode("  c"))


def test_the_real_rows_are_read(shared_data, lm):
    cleaned = read_questions(shared_data / "hellaswag/val_first_1000.jsonl")
    raw = read_questions(shared_data / "hellaswag/val_official_format_3_rows.jsonl")
    assert (len(cleaned), len(raw)) == (1000, 3)
    assert raw[0].context == "Roof shingle removal: A man is sitting on a roof. He"
    assert raw[0].endings == cleaned[0].endings
    assert raw[0].context.lower() == cleaned[0].context.lower()
    assert "[" not in raw[2].context + "".join(raw[2].endings)
