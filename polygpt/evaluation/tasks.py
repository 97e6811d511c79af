"""What a model can be evaluated by, as configuration: the registry of `polygpt eval` and of `training.evaluations`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from polygpt.config import PartConfig
from polygpt.evaluation.harness import metrics_of, run_harness, samples_of, task_manager
from polygpt.evaluation.hellaswag import Choice, Question, choose_endings, encode_questions, read_questions
from polygpt.evaluation.perplexity import check_windows, encode_text, perplexity, read_text
from polygpt.evaluation.scoring import ProgressCallback
from polygpt.files import expand
from polygpt.language_model import LanguageModel
from polygpt.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of one evaluation.

    Attributes:
        metrics: what training logs, by name; None where a number is not defined.
        facts: counts, the settings that were used, and seconds.
        rows: a record for each example, if the task keeps them.
    """

    metrics: dict[str, float | None]
    facts: dict[str, Any]
    rows: list[dict[str, Any]] | None = None


# An evaluation whose data has been read and checked.
Ready = Callable[[LanguageModel, ProgressCallback], Outcome]


class EvaluationConfig(PartConfig):
    """The slot of an evaluation; `prepare` is the one method that matters.

    Attributes:
        name: what its metrics are called in a run (`name/acc`); None is the kind (the task, for `lm_eval`).
        every: in training, steps between evaluations; 0 evaluates at the end only.
    """

    name: str | None = None
    every: NonNegativeInt = 0
    needed: ClassVar[tuple[str, ...]] = ("prepare",)

    @property
    def title(self) -> str:
        """The name of its metrics."""
        return self.name or self.kind.rpartition(":")[2]

    def check(self) -> None:
        """Checks what can be checked without a model.

        Raises:
            RequestError: data is missing or malformed, a package is not installed.
        """

    def prepare(self, tokenizer: Tokenizer, context_length: int) -> Ready:
        """Reads the data and checks it against the tokenizer and the context.

        Raises:
            RequestError: the data is missing, malformed, or does not fit.
        """
        raise NotImplementedError


class PerplexityConfig(EvaluationConfig):
    """Perplexity and bits per byte of a UTF-8 text.

    Attributes:
        path: the text's file, or a .jsonl file of documents (.gz and .zst are decompressed).
        context: input tokens a window; None is the model's context_length.
        stride: tokens between windows, each scored once; None is half of the window.
        start: put the end-of-text token before each document, if there is one.
        documents: `<|endoftext|>` in a text file divides documents, as in training; otherwise it is ordinary text.
        text_key: the key of a .jsonl object that holds the text.
    """

    kind: Literal["perplexity"] = "perplexity"
    path: str
    context: PositiveInt | None = None
    stride: PositiveInt | None = None
    start: bool = True
    documents: bool = False
    text_key: str = "text"

    @cached_property
    def _text(self) -> list[str]:
        return read_text(_path(self.path), self.documents, self.text_key)

    def check(self) -> None:
        _ = self._text

    def prepare(self, tokenizer: Tokenizer, context_length: int) -> Ready:
        windows = check_windows(self.context, self.stride, context_length)
        text = encode_text(self._text, tokenizer, self.path, self.start)

        def run(lm: LanguageModel, progress: ProgressCallback) -> Outcome:
            result = dataclasses.asdict(perplexity(lm, text, *windows, progress))
            return _outcome(result, ("nats_per_token", "perplexity", "bits_per_byte"))

        return run


class HellaSwagConfig(EvaluationConfig):
    """HellaSwag from a .jsonl file.

    Attributes:
        path: the file, in the official format or already cleaned.
        limit: its first so many questions; None is all.
    """

    kind: Literal["hellaswag"] = "hellaswag"
    path: str
    limit: PositiveInt | None = None

    @cached_property
    def _questions(self) -> list[Question]:
        return read_questions(_path(self.path), self.limit)

    def check(self) -> None:
        _ = self._questions

    def prepare(self, tokenizer: Tokenizer, context_length: int) -> Ready:
        questions = self._questions
        pairs = encode_questions(questions, tokenizer, context_length, _path(self.path))

        def run(lm: LanguageModel, progress: ProgressCallback) -> Outcome:
            result, choices = choose_endings(lm, questions, pairs, progress)
            names = ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr")
            return _outcome(dataclasses.asdict(result), names, choices)

        return run


class HarnessConfig(EvaluationConfig):
    """A task of lm-evaluation-harness, which must be installed (`pip install "polygpt[eval]"`).

    Attributes:
        task: its name there; of a group or a tag all tasks are run.
        limit: the first so many examples; None is all.
        num_fewshot: solved examples before each question; None is the task's own number.
        include_path: a folder with more tasks.
    """

    kind: Literal["lm_eval"] = "lm_eval"
    task: str
    limit: PositiveInt | None = None
    num_fewshot: NonNegativeInt | None = None
    include_path: str | None = None

    @property
    def title(self) -> str:
        return self.name or self.task

    def check(self) -> None:
        task_manager(self.task, self.include_path)

    def prepare(self, tokenizer: Tokenizer, context_length: int) -> Ready:
        manager = task_manager(self.task, self.include_path)

        def run(lm: LanguageModel, progress: ProgressCallback) -> Outcome:
            started = time.perf_counter()
            results = run_harness(
                lm, self.task, manager, limit=self.limit, num_fewshot=self.num_fewshot, progress=progress
            )
            count = sum(counts["effective"] for counts in results["n-samples"].values())
            facts = {"n": count, "num_fewshot": results["n-shot"], "seconds": time.perf_counter() - started}
            return Outcome(metrics_of(results, self.task), facts, samples_of(results))

        return run


EVALUATIONS: dict[str, type[EvaluationConfig]] = {
    "perplexity": PerplexityConfig,
    "hellaswag": HellaSwagConfig,
    "lm_eval": HarnessConfig,
}


def _path(path: str) -> Path:
    return expand(path)


def _outcome(result: dict[str, Any], metrics: tuple[str, ...], rows: list[Choice] | None = None) -> Outcome:
    facts = {name: value for name, value in result.items() if name not in metrics}
    kept = None if rows is None else [dataclasses.asdict(row) for row in rows]
    return Outcome({name: result[name] for name in metrics}, facts, kept)
