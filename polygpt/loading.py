"""From a MODEL, as commands and scripts name it, to a `LanguageModel`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import jax

from polygpt import checkpoint
from polygpt.config import Config
from polygpt.errors import RequestError, suggest
from polygpt.language_model import LanguageModel
from polygpt.model import Model, ModelConfig
from polygpt.presets import PRESETS, preset
from polygpt.process import command_line
from polygpt.summary import PRESET_VOCAB
from polygpt.tokenizers import Tokenizer, load_tokenizer
from polygpt.training import CHECKPOINTS, TOKENIZER, read_config


def build(config: ModelConfig, seed: int = 0, tokenizer: Tokenizer | None = None) -> LanguageModel:
    """A model of freshly drawn weights.

    Raises:
        RequestError: the vocabulary is open and there is no tokenizer to fill it.
    """
    if not isinstance(config, ModelConfig):
        kind = type(config).__name__ if isinstance(config, Config) else repr(config)
        raise RequestError(f"a ModelConfig is needed (such as polygpt.preset('gpt2')), not {kind}")
    if tokenizer is not None:
        config = config.with_vocab(tokenizer.vocab_size)
    return LanguageModel(config, Model(config).init(seed), tokenizer)


def load(name: str | Path, *, warn: Callable[[str], None] = warnings.warn) -> LanguageModel:
    """The model of a run's folder (its newest verified checkpoint), or a preset with random weights.

    Raises:
        RequestError: there is no such folder or preset, or the run has no usable checkpoint.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        if str(name) in PRESETS:
            return build(preset(str(name)).with_vocab(PRESET_VOCAB))
        raise RequestError(f"no run or preset '{name}'; {suggest(str(name), PRESETS)} (a run is named by its folder)")
    config = read_config(folder).model
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if tokenizer.vocab_size > config.vocab_size:
        raise RequestError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}")
    saved = checkpoint.newest(folder / CHECKPOINTS, warn)
    if saved is None:
        command = command_line("train", "--resume", "--out", folder)
        raise RequestError(f"{folder}: no usable checkpoint; train it with: {command}")
    shapes = jax.eval_shape(lambda: Model(config).init(0))
    return LanguageModel(config, checkpoint.restore(saved, "params", shapes), tokenizer)
