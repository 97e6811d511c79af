"""Resuming a run under a changed configuration: which settings may change, and which ones did."""

from __future__ import annotations

import dataclasses

from polygpt.errors import RequestError
from polygpt.training.config import RunConfig, differences
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
        for key, had, asked in differences(mine, theirs, name):
            raise RequestError(
                f"{run.folder}: this run has {key}={had}, not {asked}; "
                "resume without changing it, or start a new run with another --out"
            )
    update = {"model": model, "training": config.training, "expected": config.expected}
    changed = dataclasses.replace(run, config=own.model_copy(update=update))
    check_prompts(config.training.samples, run.tokenizer, model.context_length)
    found = [*differences(own.model.to_dict(), model.to_dict(), "model")]
    found += differences(own.training.to_dict(), config.training.to_dict(), "training")
    return changed, [f"{key} {had} → {asked}" for key, had, asked in found]
