"""A run's folder: how it is created, whole or not at all, and how it is opened again.

config.yaml      the resolved configuration
tokenizer.json   the tokenizer
data/            token shards and their tokenizer, in a folder for each source of a mixture (absent if prepared before)
checkpoints/     verified steps; best.json says which had the lowest validation loss, if that is kept
.lock            held while a process trains in the folder
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
from polygpt.data import (
    DataConfig,
    JoinedShards,
    Loader,
    MixedLoader,
    Shards,
    Stage,
    TokenSplit,
    is_prepared,
    open_shards,
    open_source,
    prepare,
    prepare_in_parallel,
    training_texts,
)
from polygpt.errors import PolygptError, RequestError
from polygpt.evaluation import EvaluationConfig, Ready
from polygpt.files import expand, new_folder, remove_folder, write_text
from polygpt.folders import CONFIG, check_new_run, check_run
from polygpt.loading import CHECKPOINTS, TOKENIZER, write_origin
from polygpt.model import ModelConfig
from polygpt.process import command_line
from polygpt.tokenizers import Tokenizer, first_bytes, load_tokenizer, train_tokenizer
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
    shards: Shards | JoinedShards

    @cached_property
    def train_loader(self) -> Loader | MixedLoader:
        """Training batches.

        Raises:
            RequestError: the training text is shorter than a window.
        """
        training, sources = self.config.training, self.config.data.sources
        if not sources:
            return self._loader(self.shards.train, stride=self.config.data.stride, seed=training.seeds.data)
        loaders = {}
        for index, (name, shards) in enumerate(self.shards.sources.items()):
            with naming(f"data.sources.{index}"):
                loaders[name] = self._loader(shards.train, stride=self.config.data.stride, seed=training.seeds.data)
        return MixedLoader(
            loaders, [Stage(*stage) for stage in self.config.data.weights()], [each.epochs for each in sources]
        )

    def _loader(self, split: TokenSplit, **options: Any) -> Loader:
        size, context = self.config.training.batch_size, self.config.model.context_length
        return Loader(split, context_length=context, batch_size=size, packing=self.config.data.packing, **options)

    @cached_property
    def validation_loader(self) -> Loader:
        """Validation batches, in order; of a mixture, those of all sources."""
        return self._loader(self.shards.validation, shuffle=False)

    @cached_property
    def source_loaders(self) -> dict[str, Loader]:
        """Validation batches of each source of a mixture, by name."""
        sources = self.shards.sources if self.config.data.sources else {}
        return {name: self._loader(shards.validation, shuffle=False) for name, shards in sources.items()}

    @cached_property
    def evaluations(self) -> list[tuple[EvaluationConfig, Ready]]:
        """`training.evaluations`, ready to run: the data is read and fits the run's model.

        Raises:
            RequestError: the data is missing, malformed, or does not fit; the evaluation is named.
        """
        ready = []
        for index, evaluation in enumerate(self.config.training.evaluations):
            with naming(f"training.evaluations.{index}"):
                ready.append((evaluation, evaluation.prepare(self.tokenizer, self.config.model.context_length)))
        return ready


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Adds the key of a setting to a refusal."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{key}: {error}") from None


def create_run(config: RunConfig, folder: Path, note: Callable[[str], None], check: Callable[[Run], None]) -> Run:
    """Trains the tokenizer, prepares the shards and writes the folder, unless `check` refuses the run.

    Raises:
        RequestError: the folder exists, the data cannot be used, or the parts do not fit together.
        PolygptError: the folder cannot be written.
    """
    check_new_run(folder)
    if config.training.initial is not None:
        check_initial(config)
    with new_folder(folder) as partial:
        tokenizer = _tokenizer(config, note)
        shards = _write_shards(config, tokenizer, partial / DATA, folder, note)
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
    if not _missing(config, own):
        try:
            return Run(folder, config, tokenizer, _open(config, own, tokenizer))
        except RequestError as error:
            if not own.exists():
                raise
            raise RequestError(f"{error}; or remove {own}, which resuming prepares again") from None
    if note is None:
        command = command_line("train", "--resume", "--out", folder)
        raise RequestError(f"{own}: the prepared data is missing; prepare it again and continue with: {command}")
    return _prepare_again(Run(folder, config, tokenizer, None), note)


def _prepare_again(run: Run, note: Callable[[str], None]) -> Run:
    """The run with its missing shards, prepared as they were; other ones are refused and removed."""
    own, data = run.folder / DATA, run.config.data
    path = ", ".join(str(each.path) for each in data.each().values())
    note(f"data: {own} is missing; preparing it again from {path}")
    run = dataclasses.replace(run, shards=_write_shards(run.config, run.tokenizer, own, run.folder, note))
    saved = checkpoint.newest(run.folder / CHECKPOINTS, warn=note)
    data = saved.info.get("fingerprints", {}).get("data") if saved is not None else None
    if data is not None and data != run.shards.train.fingerprint:
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
    check_run(folder)
    path = folder / CONFIG
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


def _folders(config: RunConfig, own: Path) -> dict[str, Path]:
    """The folder of shards of each source: its own, or one in the run's folder of data."""
    each = config.data.each().items()
    return {name: expand(data.paths[0]) if is_prepared(data) else own / name for name, data in each}


def _missing(config: RunConfig, own: Path) -> bool:
    """Whether shards that belong in the run's folder are not there."""
    return any(not folder.exists() for folder in _folders(config, own).values() if own in (folder, folder.parent))


def _open(config: RunConfig, own: Path, tokenizer: Tokenizer) -> Shards | JoinedShards:
    return _joined({name: open_shards(folder, tokenizer) for name, folder in _folders(config, own).items()})


def _joined(shards: dict[str, Shards]) -> Shards | JoinedShards:
    return shards[""] if "" in shards else JoinedShards(shards)


def _tokenizer(config: RunConfig, note: Callable[[str], None]) -> Tokenizer:
    """That of the first prepared source, if there is one, or the configured one, trained on all sources."""
    each, wanted = config.data.each().values(), config.tokenizer
    prepared = next((expand(data.paths[0]) for data in each if is_prepared(data)), None)
    if prepared is not None:
        path = wanted.place or prepared / TOKENIZER
        if wanted.kind == "initial":
            check_prepared(config, prepared)
        note(f"data: prepared shards in {prepared}, with their own tokenizer")
        return load_tokenizer(path)
    sources = [(open_source(data), data) for data in each]
    note(f"data: {'; '.join(source.describe() for source, _ in sources)}")
    if wanted.kind == "char":
        # An alphabet says next to nothing about the held-out text, and a character outside it could not be encoded.
        texts = (document.text for source, _ in sources for document in source)
    else:
        share = max(1, wanted.train_bytes // len(sources))
        texts = (text for source, data in sources for text in first_bytes(training_texts(source, data), share))
    tokenizer = initial_tokenizer(config) if wanted.kind == "initial" else train_tokenizer(wanted, texts)
    note(f"tokenizer: {wanted.kind}, {tokenizer.vocab_size} ids, {tokenizer.fingerprint[:12]}")
    return tokenizer


def _write_shards(
    config: RunConfig, tokenizer: Tokenizer, own: Path, run: Path, note: Callable[[str], None]
) -> Shards | JoinedShards:
    """Prepares what has to be and is not in the folder `own` yet, and opens all.

    Unfinished work is kept beside the folder `run`: what is in it is removed if the run cannot be created.
    """
    each, shards = config.data.each(), {}
    for name, folder in _folders(config, own).items():
        if own in (folder, folder.parent) and not folder.exists():
            work = run.with_name(f"{run.name}.{folder.name}.work")
            shards[name] = _write_source(each[name], tokenizer, folder, work, name or "shards", note)
        else:
            shards[name] = open_shards(folder, tokenizer)
    return _joined(shards)


def _write_source(
    data: DataConfig, tokenizer: Tokenizer, folder: Path, work: Path, name: str, note: Callable[[str], None]
) -> Shards:
    source = open_source(data)
    if data.workers > 1 or data.engine == "ray":
        shards = prepare_in_parallel(source, tokenizer, folder, data, work=work, note=note)
    else:
        shards = prepare(source, tokenizer, folder, data)
    if source.tally.invalid:
        note(f"data: {source.tally.invalid} documents were not UTF-8 ({data.invalid_utf8})")
    lost = shards.manifest.validation.lost_bytes
    if lost:
        note(f"data: the tokenizer has no tokens for {lost:,} bytes of held-out text; bits per byte leave them out")
    train, validation = shards.train, shards.validation
    note(
        f"{name}: {train.tokens:,} tokens of {_documents(train)} to train on, {validation.tokens:,} of "
        f"{_documents(validation)} held out ({validation.bytes:,} bytes)"
    )
    return shards


def _documents(split: TokenSplit) -> str:
    return f"{split.documents:,} document{'s' * (split.documents > 1)}"
