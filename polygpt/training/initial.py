"""Starting from an existing model: its weights, its tokenizer, and what came with it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from jaxtyping import PyTree

from polygpt.checkpoint import NotFiniteError, check_finite
from polygpt.data import open_shards
from polygpt.errors import RequestError
from polygpt.interop import StoredModel
from polygpt.loading import check_shapes, find
from polygpt.model import Params
from polygpt.origin import Origin
from polygpt.tokenizers import Tokenizer
from polygpt.training.config import RunConfig, differences


@lru_cache(maxsize=1)
def _found(initial: str) -> StoredModel:
    return find(initial)


def check_initial(config: RunConfig) -> None:
    """Looks up `training.initial` (again), before anything is prepared.

    Raises:
        RequestError: it has no tokenizer, or its weights do not fit the run's model; the first difference is named.
    """
    _found.cache_clear()
    initial_tokenizer(config)
    check_shapes(_found(config.training.initial).config, config.model, f"training.initial={config.training.initial}")


def initial_params(config: RunConfig, shardings: PyTree | None = None) -> Params:
    """The weights of `training.initial` for the run's model, where `shardings` puts them on a mesh.

    Raises:
        RequestError: it cannot be read, it does not fit the run's model, or its values are not finite numbers.
    """
    found, name = _found(config.training.initial), f"training.initial={config.training.initial}"
    check_shapes(found.config, config.model, name)
    try:
        params = found.read(config.model, int, shardings=shardings)
        check_finite(name, params)
    except NotFiniteError as error:
        raise RequestError(f"{error}; start from a model that is whole") from None
    return params


def initial_changes(config: RunConfig) -> list[str]:
    """What the run's model computes differently from `training.initial`: `model.context_length 2048 → 256`."""
    theirs, ours = _found(config.training.initial).config.architecture(), config.model.architecture()
    return [f"{key} {had} → {asked}" for key, had, asked in differences(theirs, ours, "model")]


def initial_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of `training.initial`.

    Raises:
        RequestError: it has none.
    """
    tokenizer = _found(config.training.initial).tokenizer
    if tokenizer is None:
        raise RequestError(f"training.initial={config.training.initial}: it has no tokenizer to prepare text with")
    return tokenizer


def initial_origin(config: RunConfig) -> Origin:
    """What came with `training.initial`, and its name."""
    found = _found(config.training.initial)
    return Origin(found.stop_tokens, found.chat_template, {**found.facts, "source": config.training.initial})


def check_prepared(config: RunConfig, folder: Path) -> None:
    """Refuses shards that were prepared with another tokenizer than the initial model's.

    Raises:
        RequestError: they do not match.
    """
    open_shards(folder, initial_tokenizer(config))
