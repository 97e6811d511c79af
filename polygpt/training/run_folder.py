"""A run's folder: how it is created, whole or not at all, and how it is opened again.

config.yaml      the resolved configuration
tokenizer.json   the tokenizer
data/            token shards (absent if `data.path` is a folder of prepared shards)
checkpoints/     verified steps
metrics.jsonl    one JSON object per line: what it is (`event`), `step`, and `loss`, `val_loss` or other metrics
samples.jsonl    text sampled during training
result.json      the final figures; like loss.png and report.html, written at the end
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from polygpt import checkpoint
from polygpt.config import read_yaml, to_yaml, validate
from polygpt.data import Loader, Shards, TokenSplit, is_prepared, open_shards, open_source, prepare, training_texts
from polygpt.errors import PolygptError, RequestError
from polygpt.evaluation import EvaluationConfig, Ready
from polygpt.files import check_checkpoint_path, new_folder, remove_folder, write_text
from polygpt.loading import CHECKPOINTS, CONFIG, TOKENIZER, write_origin
from polygpt.model import ModelConfig
from polygpt.process import command_line
from polygpt.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from polygpt.training.config import RunConfig
from polygpt.training.initial import check_initial, check_prepared, initial_origin, initial_tokenizer
from polygpt.training.prompts import check_prompts

DATA = "data"
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


@dataclass(frozen=True)
class Run:
    """An opened run. Its configuration is resolved (the vocabulary is filled in); its data is read once."""

    folder: Path
    config: RunConfig
    tokenizer: Tokenizer
    shards: Shards

    @cached_property
    def train_loader(self) -> Loader:
        """Training batches.

        Raises:
            RequestError: the training text is shorter than a window.
        """
        training, context = self.config.training, self.config.model.context_length
        return Loader(
            self.shards.train,
            context_length=context,
            batch_size=training.batch_size,
            stride=self.config.data.stride,
            seed=training.seeds.data,
            packing=self.config.data.packing,
        )

    @cached_property
    def validation_loader(self) -> Loader:
        """Validation batches, in order."""
        size, context = self.config.training.batch_size, self.config.model.context_length
        packing = self.config.data.packing
        return Loader(self.shards.validation, context_length=context, batch_size=size, shuffle=False, packing=packing)

    @cached_property
    def evaluations(self) -> list[tuple[EvaluationConfig, Ready]]:
        """`training.evaluations`, ready to run: the data is read and fits the run's model.

        Raises:
            RequestError: the data is missing, malformed, or does not fit; the evaluation is named.
        """
        ready = []
        for index, evaluation in enumerate(self.config.training.evaluations):
            with naming_evaluation(index):
                ready.append((evaluation, evaluation.prepare(self.tokenizer, self.config.model.context_length)))
        return ready


@contextmanager
def naming_evaluation(index: int) -> Iterator[None]:
    """Adds the key of an entry of `training.evaluations` to a refusal."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"training.evaluations.{index}: {error}") from None


def create_run(config: RunConfig, folder: Path, note: Callable[[str], None], check: Callable[[Run], None]) -> Run:
    """Trains the tokenizer, prepares the shards and writes the folder, unless `check` refuses the run.

    Raises:
        RequestError: the folder exists, the data cannot be used, or the parts do not fit together.
        PolygptError: the folder cannot be written.
    """
    if folder.exists():
        if (folder / CONFIG).is_file():
            raise RequestError(f"{folder}: exists already; continue it with --resume, or choose another --out")
        raise RequestError(f"{folder}: exists and is no run; choose another --out")
    check_checkpoint_path(folder)
    if config.training.initial is not None:
        check_initial(config)
    with new_folder(folder) as partial:
        tokenizer, shards = _prepare(config, partial, note)
        model = resolve_vocabulary(config.model, tokenizer)
        # The shards stay mapped when the folder gets its name.
        run = Run(folder, config.model_copy(update={"model": model}), tokenizer, shards)
        check_prompts(config.training.samples, tokenizer, model.context_length)
        check(run)
        if config.training.initial is not None:
            write_origin(partial, initial_origin(config))
        tokenizer.save(partial / TOKENIZER)
        write_config(partial, run.config)
    return run


def open_run(folder: Path, note: Callable[[str], None] | None = None) -> Run:
    """The run in `folder`, its shards verified.

    Args:
        folder: the run's.
        note: progress callback. With it, shards that are missing are prepared again from the source.

    Raises:
        RequestError: there is no run, its files do not fit together, or its text has changed since.
    """
    config = read_config(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    own = folder / DATA
    if own.exists():
        return Run(folder, config, tokenizer, open_shards(own, tokenizer))
    if is_prepared(config.data):
        return Run(folder, config, tokenizer, open_shards(config.data.paths[0], tokenizer))
    if note is None:
        command = command_line("train", "--resume", "--out", folder)
        raise RequestError(f"{own}: the prepared data is missing; prepare it again and continue with: {command}")
    return _prepare_again(Run(folder, config, tokenizer, None), note)


def _prepare_again(run: Run, note: Callable[[str], None]) -> Run:
    """The run with its missing shards, prepared as they were; other ones are refused and removed."""
    own, path = run.folder / DATA, run.config.data.path
    note(f"data: {own} is missing; preparing it again from {path}")
    run = dataclasses.replace(run, shards=_write_shards(run.config, run.tokenizer, own, note))
    saved = checkpoint.newest(run.folder / CHECKPOINTS, warn=note)
    if saved is not None and saved.info["data"] not in (None, run.train_loader.fingerprint):
        remove_folder(own)
        raise RequestError(
            f"{own}: is missing, and cannot be prepared again: data.path={path} now gives other tokens than those of "
            f"{saved.folder.name}; bring back the original text (or the folder), or start a new run"
        )
    return run


def write_config(folder: Path, config: RunConfig) -> None:
    """Writes the run's configuration atomically.

    Raises:
        PolygptError: it cannot be written; the one before it stays.
    """
    try:
        write_text(folder / CONFIG, to_yaml(config))
    except OSError as error:
        raise PolygptError(f"{folder / CONFIG}: cannot be written ({error.strerror or error})") from None


def read_config(folder: Path) -> RunConfig:
    """The resolved configuration of the run in `folder`.

    Raises:
        RequestError: there is no run in it.
    """
    path = folder / CONFIG
    if not path.is_file():
        new = folder.with_name(f"{folder.name}-run") if folder.exists() else folder
        start = command_line("train", "RECIPE", "--out", new)
        raise RequestError(f"{folder}: no run here (it has no {CONFIG}); start one with: {start}")
    return validate(RunConfig, read_yaml(path), str(path))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file, one per line, up to a line that a crash cut short; [] if there is no file."""
    if not path.is_file():
        return []
    lines = []
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.split("\n"):  # not splitlines, which would also split at a U+2028 inside a sample
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, each with its `event`, which lines of earlier versions lack."""

    def event(line: dict[str, Any]) -> str:
        return "step" if "loss" in line else "validation" if "val_loss" in line else "evaluation"

    return [{"event": event(line), **line} for line in read_lines(run / METRICS)]


def resolve_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model with the tokenizer's vocabulary size if its own is open.

    Raises:
        RequestError: the tokenizer has ids that the model has no embedding for.
    """
    model = model.with_vocab(tokenizer.vocab_size)
    if model.vocab_size < tokenizer.vocab_size:
        raise RequestError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} ids; "
            "leave it out to take the tokenizer's"
        )
    return model


def _prepare(config: RunConfig, partial: Path, note: Callable[[str], None]) -> tuple[Tokenizer, Shards]:
    if is_prepared(config.data):
        folder = Path(config.data.paths[0]).expanduser()
        wanted = config.tokenizer
        path = wanted.path if wanted.kind == "file" else folder / TOKENIZER
        if wanted.kind == "initial":
            check_prepared(config, folder)
        note(f"data: prepared shards in {folder}, with their own tokenizer")
        tokenizer = load_tokenizer(path)
        return tokenizer, open_shards(folder, tokenizer)
    source = open_source(config.data)
    note(f"data: {source.describe()}")
    # An alphabet says next to nothing about the held-out text, and a character outside it could not be encoded.
    whole = config.tokenizer.kind == "char"
    texts = (document.text for document in source) if whole else training_texts(source, config.data)
    initial = config.tokenizer.kind == "initial"
    tokenizer = initial_tokenizer(config) if initial else train_tokenizer(config.tokenizer, texts)
    note(f"tokenizer: {config.tokenizer.kind}, {tokenizer.vocab_size} ids, {tokenizer.fingerprint[:12]}")
    return tokenizer, _write_shards(config, tokenizer, partial / DATA, note)


def _write_shards(config: RunConfig, tokenizer: Tokenizer, folder: Path, note: Callable[[str], None]) -> Shards:
    source = open_source(config.data)
    shards = prepare(source, tokenizer, folder, config.data)
    if source.tally.invalid:
        note(f"data: {source.tally.invalid} documents were not UTF-8 ({config.data.invalid_utf8})")
    lost = shards.manifest.validation.lost_bytes
    if lost:
        note(f"data: the tokenizer has no tokens for {lost:,} bytes of held-out text; bits per byte leave them out")
    train, validation = shards.train, shards.validation
    note(
        f"shards: {train.tokens:,} tokens of {_documents(train)} to train on, {validation.tokens:,} of "
        f"{_documents(validation)} held out ({validation.bytes:,} bytes)"
    )
    return shards


def _documents(split: TokenSplit) -> str:
    return f"{split.documents:,} document{'s' * (split.documents > 1)}"
