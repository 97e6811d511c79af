"""A run's folder: what is in it, how it comes to be whole or not at all, and how one is opened again.

config.yaml      the resolved configuration
tokenizer.json   the tokenizer
data/            token shards (absent where `data.path` is a folder of shards already)
checkpoints/     verified steps
metrics.jsonl    one JSON object a line, with `step` and `loss` or `val_loss`
samples.jsonl    what the model wrote along the way
result.json      what the run came to; with loss.png and report.html, written at the end
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polygpt.config import read_yaml, to_yaml, validate
from polygpt.data import Shards, is_prepared, open_shards, open_source, prepare, training_texts
from polygpt.errors import RequestError
from polygpt.files import check_checkpoint_path, new_folder, write_text
from polygpt.loading import CONFIG, TOKENIZER, write_origin
from polygpt.model import ModelConfig
from polygpt.process import command_line
from polygpt.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from polygpt.training.config import RunConfig
from polygpt.training.initial import check_initial, check_prepared, initial_origin, initial_tokenizer

DATA = "data"
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


@dataclass(frozen=True)
class Run:
    """An opened run: its configuration is resolved (the vocabulary is filled in)."""

    folder: Path
    config: RunConfig
    tokenizer: Tokenizer
    shards: Shards


def create_run(config: RunConfig, folder: Path, tell: Callable[[str], None], check: Callable[[Run], None]) -> Run:
    """Trains the tokenizer, prepares the shards, and writes the folder; `check` may still refuse the whole.

    Raises:
        RequestError: the folder exists, the data cannot be used, or the parts do not fit together.
        PolygptError: the folder cannot be written.
    """
    if folder.exists():
        raise RequestError(f"{folder}: exists already; go on with it (--resume), or choose another --out")
    check_checkpoint_path(folder)
    if config.training.initial is not None:
        check_initial(config)
    with new_folder(folder) as partial:
        tokenizer, shards = _prepare(config, partial, tell)
        model = resolve_vocabulary(config.model, tokenizer)
        run = Run(partial, config.replace(model=model.to_dict()), tokenizer, shards)
        if config.training.initial is not None:
            write_origin(partial, initial_origin(config))
        check_prompts(run)
        check(run)
        tokenizer.save(partial / TOKENIZER)
        write_config(partial, run.config)
    return open_run(folder)


def open_run(folder: Path) -> Run:
    """The run in `folder`, its shards verified.

    Raises:
        RequestError: there is no run, or its files do not fit together.
    """
    config = read_config(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    own = folder / DATA
    shards = open_shards(own if own.exists() else config.data.paths[0], tokenizer)
    return Run(folder, config, tokenizer, shards)


def write_config(folder: Path, config: RunConfig) -> None:
    """Writes the run's configuration, whole or not at all."""
    write_text(folder / CONFIG, to_yaml(config))


def read_config(folder: Path) -> RunConfig:
    """The resolved configuration of the run in `folder`.

    Raises:
        RequestError: there is no run in it.
    """
    path = folder / CONFIG
    if not path.is_file():
        start = command_line("train", "RECIPE", "--out", folder)
        raise RequestError(f"{folder}: no run here (it has no {CONFIG}); start one with: {start}")
    return validate(RunConfig, read_yaml(path), str(path))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a line file; a last line that was cut by a crash is left out, a missing file has none."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").split(
        "\n"
    ):  # not splitlines: U+2028 may stand in a sample
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def resolve_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model with the tokenizer's vocabulary where its own is open.

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


def check_prompts(run: Run) -> None:
    """Refuses prompts that the samples along the way could not start from, before hours have gone into training."""
    samples, context = run.config.training.samples, run.config.model.context_length
    for index, prompt in enumerate(samples.prompts if samples.every else ()):
        where = f"training.samples.prompts.{index}"
        try:
            tokens = len(run.tokenizer.encode(prompt))
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None
        if tokens > context:
            raise RequestError(f"{where}: has {tokens} tokens, model.context_length is {context}; shorten it")
        if not tokens and run.tokenizer.end_of_text is None:
            raise RequestError(f"{where}: is empty, and the tokenizer has no end-of-text token to start from")


def _prepare(config: RunConfig, partial: Path, tell: Callable[[str], None]) -> tuple[Tokenizer, Shards]:
    if is_prepared(config.data):
        folder = Path(config.data.paths[0]).expanduser()
        wanted = config.tokenizer
        path = wanted.path if wanted.kind == "file" else folder / TOKENIZER
        if wanted.kind == "initial":
            check_prepared(config, folder)
        tell(f"data: prepared shards in {folder}, with their own tokenizer")
        tokenizer = load_tokenizer(path)
        return tokenizer, open_shards(folder, tokenizer)
    source = open_source(config.data)
    tell(f"data: {source.describe()}")
    # An alphabet is no knowledge of the held-out text, and a character outside it could not be encoded at all.
    whole = config.tokenizer.kind == "char"
    texts = (document.text for document in source) if whole else training_texts(source, config.data)
    initial = config.tokenizer.kind == "initial"
    tokenizer = initial_tokenizer(config) if initial else train_tokenizer(config.tokenizer, texts)
    tell(f"tokenizer: {config.tokenizer.kind}, {tokenizer.vocab_size} ids, {tokenizer.fingerprint[:12]}")
    shards = prepare(source, tokenizer, partial / DATA, config.data)
    if source.invalid.documents:
        tell(f"data: {source.invalid.documents} documents were not UTF-8 ({config.data.invalid_utf8})")
    train, validation = shards.train, shards.validation
    tell(f"shards: {train.tokens:,} tokens to train on, {validation.tokens:,} held out ({validation.bytes:,} bytes)")
    return tokenizer, shards
