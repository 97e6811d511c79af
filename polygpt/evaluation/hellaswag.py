"""HellaSwag: which of four endings is the likeliest (Zellers et al. 2019), as lm-evaluation-harness scores it."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polygpt.data import open_bytes
from polygpt.errors import RequestError
from polygpt.evaluation.pairs import Pair, encode_pairs
from polygpt.evaluation.scoring import ProgressCallback, no_progress, score_continuations
from polygpt.language_model import LanguageModel
from polygpt.tokenizers import Tokenizer

ENDINGS = 4


class Question(NamedTuple):
    """One row: `line` in its file, `index` as the file numbers it, and the text as it is scored."""

    line: int
    index: int
    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Choice:
    """What the model chose for one question: an ending's number, by Σ ln p and by Σ ln p a byte of the ending."""

    index: int
    label: int
    choice: int
    choice_norm: int
    log_likelihoods: tuple[float, ...]


@dataclass(frozen=True)
class HellaSwagResult:
    """Accuracies of n questions with their standard errors (None of a single one): sqrt(p·(1-p)/(n-1))."""

    acc: float
    acc_norm: float
    acc_stderr: float | None
    acc_norm_stderr: float | None
    n: int
    seconds: float


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The first `limit` questions (all by default) of a .jsonl file, in the official format or already cleaned.

    A row with `ctx_a` and `ctx_b` is raw: it is cleaned as lm-evaluation-harness does. One with `ctx` alone is taken
    as it stands. In both the context is "activity_label: " and the text.

    Raises:
        RequestError: the file is missing or empty, or a row is malformed; its line is named.
    """
    if path.is_dir():
        raise RequestError(f"{path}: is a folder; give HellaSwag's .jsonl file")
    questions: list[Question] = []
    with open_bytes(path) as stream:
        for number, line in enumerate(stream, 1):
            if limit is not None and len(questions) == limit:
                break
            if line.strip():
                questions.append(_question(line, number, f"{path} line {number}"))
    if not questions:
        raise RequestError(f"{path}: no questions in it; a row of HellaSwag's .jsonl a line is needed")
    return questions


def encode_questions(
    questions: Sequence[Question], tokenizer: Tokenizer, context_length: int, path: Path
) -> list[Pair]:
    """(context, ending) ids of all endings of all questions, in order; contexts begin with the start token, if any.

    Raises:
        RequestError: an ending does not fit in the context, or the tokenizer cannot hold a text; the line is named.
    """
    texts = [(question.context, " " + ending) for question in questions for ending in question.endings]
    where = [f"{path} line {question.line}" for question in questions for _ in question.endings]

    def encode_all(texts: Sequence[str]) -> list[list[int]]:
        return [[*tokenizer.start, *ids.tolist()] for ids in tokenizer.encode_batch(texts)]

    return encode_pairs(texts, encode_all, context_length, where)


def choose_endings(
    lm: LanguageModel, questions: Sequence[Question], pairs: Sequence[Pair], progress: ProgressCallback = no_progress
) -> tuple[HellaSwagResult, list[Choice]]:
    """Scores every question's endings; `pairs` are their ids (`encode_questions`). Of equal scores the first counts.

    Raises:
        PolygptError: a likelihood is not a number.
    """
    started = time.perf_counter()

    def questions_done(done: int, total: int) -> None:
        progress(done // ENDINGS, total // ENDINGS)

    scores = score_continuations(lm.model, lm.params, pairs, questions_done)
    sums = np.array([score.log_likelihood for score in scores]).reshape(len(questions), ENDINGS)
    lengths = np.array([[len(ending.encode()) for ending in question.endings] for question in questions])
    labels = np.array([question.label for question in questions])
    plain, normalised = sums.argmax(1), (sums / lengths).argmax(1)
    acc, acc_norm = (float((chosen == labels).mean()) for chosen in (plain, normalised))
    count = len(questions)
    result = HellaSwagResult(
        acc, acc_norm, _stderr(acc, count), _stderr(acc_norm, count), count, time.perf_counter() - started
    )
    choices = [
        Choice(question.index, question.label, int(a), int(b), tuple(row))
        for question, a, b, row in zip(questions, plain, normalised, sums.tolist(), strict=True)
    ]
    return result, choices


def clean(text: str) -> str:
    """`text` without WikiHow's marks, as lm-evaluation-harness cleans it (its `tasks/hellaswag/utils.py`)."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _stderr(share: float, count: int) -> float | None:
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None


def _question(line: bytes, number: int, where: str) -> Question:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"{where}: not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: not JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(row, dict):
        raise RequestError(f"{where}: an object is needed, not {type(row).__name__}")
    raw = "ctx_a" in row
    endings = row.get("endings")
    if not isinstance(endings, list) or len(endings) != ENDINGS or not all(isinstance(e, str) for e in endings):
        raise RequestError(f"{where}: 'endings' must be a list of {ENDINGS} texts")
    activity = _text(row, "activity_label", where)
    if raw:
        context = clean(f"{activity}: {_text(row, 'ctx_a', where)} {_text(row, 'ctx_b', where).capitalize()}")
        endings = [clean(ending) for ending in endings]
    else:
        context = f"{activity}: {_text(row, 'ctx', where)}"
    if not all(endings):
        raise RequestError(f"{where}: ending {[bool(e) for e in endings].index(False)} is empty")
    index = row.get("ind", number - 1)
    return Question(
        number, index if isinstance(index, int) else number - 1, context, tuple(endings), _label(row, where)
    )


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row.get(key), str):
        raise RequestError(f"{where}: '{key}' must be a text, not {row.get(key)!r:.40}")
    return row[key]


def _label(row: dict[str, Any], where: str) -> int:
    label = row.get("label")
    if isinstance(label, str) and label.isdecimal():  # as Hugging Face's copy has it
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < ENDINGS:
        raise RequestError(
            f"{where}: 'label' must be 0 to {ENDINGS - 1}, not {label!r:.40} (the test set has no labels)"
        )
    return label
