"""Resuming a run: which settings may change, which ones did, and the state of its newest checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from polygpt import checkpoint
from polygpt.checkpoint import Checkpoint, NotFiniteError, Snapshot
from polygpt.distributed import is_main, main_decides
from polygpt.errors import PolygptError, RequestError
from polygpt.loading import CHECKPOINTS, RESULT
from polygpt.sharding import MeshConfig, MeshSetting, describe_mesh
from polygpt.training.config import RunConfig, differences
from polygpt.training.events import Listener, Note, RunResult
from polygpt.training.prompts import check_prompts
from polygpt.training.run_folder import Run
from polygpt.training.saving import abstract_parts, fingerprints, join_state
from polygpt.training.state import TrainState
from polygpt.training.step import Trainer


def with_changes(run: Run, config: RunConfig) -> tuple[Run, list[str]]:
    """The run under `config`, and each setting that changes: `training.steps 100 → 200`.

    The model's architecture, the tokenizer and the data must stay. How the model is computed (`scan_layers`,
    `implementation`) and trained (dropout, auxiliary losses, everything in `training`) may change.

    Raises:
        RequestError: something else differs; the first difference is named.
    """
    own, model = run.config, config.model.with_vocab(run.config.model.vocab_size)
    if own.model.param_dtype != model.param_dtype:
        raise RequestError(
            f"{run.folder}: this run has model.param_dtype={own.model.param_dtype}, not {model.param_dtype}: its state "
            "would have to be converted, and the run would not be the same; start a new run from its weights "
            f"(training.initial={run.folder}), or resume without changing it"
        )
    compared = {
        "model": (own.model.architecture(), model.architecture()),
        "tokenizer": (own.tokenizer.to_dict(), config.tokenizer.to_dict()),
        "data": (_content(own), _content(config)),
        "training": (_fixed(own), _fixed(config)),
    }
    for name, (mine, theirs) in compared.items():
        for key, had, asked in differences(mine, theirs, name):
            raise RequestError(
                f"{run.folder}: this run has {key}={had}, not {asked}; "
                "resume without changing it, or start a new run with another --out"
            )
    update = {"model": model, "data": config.data, "training": config.training, "expected": config.expected}
    update["mesh"] = config.mesh
    changed = dataclasses.replace(run, config=own.model_copy(update=update))
    check_prompts(config.training.samples, run.tokenizer, model.context_length)
    found = [*differences(own.model.to_dict(), model.to_dict(), "model")]
    found += differences(own.data.to_dict(), config.data.to_dict(), "data")
    found += differences(own.training.to_dict(), config.training.to_dict(), "training")
    found += [] if own.mesh == config.mesh else [("mesh", _spelled(own.mesh), _spelled(config.mesh))]
    return changed, [f"{key} {had} → {asked}" for key, had, asked in found]


def _spelled(mesh: MeshSetting) -> str:
    return describe_mesh(mesh.shape) if isinstance(mesh, MeshConfig) else mesh or "one device"


def _content(config: RunConfig) -> dict[str, Any]:
    """The settings of data that say which tokens there are."""
    return config.data.without_execution().to_dict()


def _fixed(config: RunConfig) -> dict[str, Any]:
    """The settings of training that must stay when a run is resumed."""
    training = config.training
    return {
        "batch_size": training.batch_size,
        "seed": training.seeds.dropout,
        "data_seed": training.seeds.data,
        "optimizer.kind": training.optimizer.kind,
    }


def restored(
    run: Run, trainer: Trainer, emit: Listener, wanted: Callable[[int], bool] = lambda step: True
) -> tuple[TrainState, Snapshot] | None:
    """The state of the newest checkpoint that is intact and finite, and its plain values; None if there is none.

    Only steps that are `wanted` are looked at.

    Raises:
        RequestError: it is of another run, or past the last step.
    """
    like = abstract_parts(trainer)
    for saved in _verified_for_all(run.folder / CHECKPOINTS, lambda text: emit(Note(text, warning=True))):
        if not wanted(saved.step):
            continue
        _check_resumable(run, saved)
        try:
            snapshot = checkpoint.restore(saved, *like)
        except NotFiniteError as error:
            emit(Note(f"{error}; trying the step before it", warning=True))
            continue
        return join_state(trainer, snapshot.params, snapshot.training), dataclasses.replace(
            snapshot, params=None, training=None
        )
    if any((run.folder / CHECKPOINTS).glob("step_*")):
        emit(Note("no checkpoint is usable: training starts again from the first step", warning=True))
    else:
        emit(Note("no checkpoint yet: starting from the first step"))
    return None


def _verified_for_all(root: Path, warn: Callable[[str], None]) -> Iterator[Checkpoint]:
    """The verified steps, newest first. Of several processes, number 0 verifies them for all."""
    found = checkpoint.verified(root, warn) if is_main() else iter(())

    def describe_next() -> list[Any] | None:
        saved = next(found, None)
        return None if saved is None else [saved.folder.name, saved.step, saved.info, saved.resumable]

    while (described := main_decides("checkpoint", describe_next)) is not None:
        name, *rest = described
        yield Checkpoint(root / name, *rest)


def _check_resumable(run: Run, saved: Checkpoint) -> None:
    if not saved.resumable:
        raise RequestError(
            f"{saved.folder}: has no state of training that this version can resume; its weights can be used: start a "
            f"new run with training.initial={run.folder}"
        )
    stored, own = saved.info.get("fingerprints", {}), fingerprints(run)
    differ = [name for name in own if stored.get(name) != own[name]]
    if differ:
        raise RequestError(
            f"{run.folder}: {saved.folder.name} was trained with another {' and another '.join(differ)}; bring back "
            "what it was trained with, or start a new run with another --out"
        )
    if saved.step > run.config.training.steps:
        raise RequestError(
            f"{run.folder}: the run is past training.steps={run.config.training.steps} (step {saved.step} is saved); "
            "give more steps, or start a new run with another --out"
        )


def finished_result(folder: Path, steps: int) -> RunResult | None:
    """The result of the run in `folder` if all its `steps` are done and its last step is saved and intact."""
    path = folder / RESULT
    try:
        result = RunResult(**json.loads(path.read_text(encoding="utf-8")))
        checkpoint.verify(checkpoint.step_folder(folder / CHECKPOINTS, steps))
    except (OSError, ValueError, TypeError, PolygptError):
        return None
    return result if result.steps == steps else None
