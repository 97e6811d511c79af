"""Resuming a run under a changed configuration: which settings may change, and which ones did."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from polygpt.errors import RequestError
from polygpt.training.config import RunConfig
from polygpt.training.prompts import check_prompts
from polygpt.training.run_folder import Run


def with_changes(run: Run, config: RunConfig) -> tuple[Run, list[str]]:
    """The run under `config`, and each setting that changes: `training.steps 100 → 200`.

    The model's architecture, the tokenizer and the data must stay. How the model is computed (`scan_layers`,
    `implementation`) and trained (dropout, auxiliary losses, everything in `training`) may change.

    Raises:
        RequestError: something else differs; the first difference is named.
    """
    own, model = run.config, config.model.with_vocab(run.config.model.vocab_size)
    compared = {
        "model": (own.model.architecture(), model.architecture()),
        "tokenizer": (own.tokenizer.to_dict(), config.tokenizer.to_dict()),
        "data": (own.data.to_dict(), config.data.to_dict()),
    }
    for name, (mine, theirs) in compared.items():
        for key, had, asked in _differences(mine, theirs, name):
            raise RequestError(
                f"{run.folder}: this run has {key}={had}, not {asked}; "
                "resume without changing it, or start a new run with another --out"
            )
    changed = dataclasses.replace(run, config=own.model_copy(update={"model": model, "training": config.training}))
    check_prompts(config.training.samples, run.tokenizer, model.context_length)
    found = [*_differences(own.model.to_dict(), model.to_dict(), "model")]
    found += _differences(own.training.to_dict(), config.training.to_dict(), "training")
    return changed, [f"{key} {had} → {asked}" for key, had, asked in found]


def _differences(mine: Any, theirs: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """The dotted keys at which two plain configurations differ, with both values."""
    if isinstance(mine, dict) and isinstance(theirs, dict) and set(mine) == set(theirs):
        for name in mine:
            yield from _differences(mine[name], theirs[name], f"{key}.{name}")
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for index, (had, asked) in enumerate(zip(mine, theirs, strict=True)):
            yield from _differences(had, asked, f"{key}.{index}")
    elif mine != theirs:
        yield key, mine, theirs
