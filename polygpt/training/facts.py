"""What a run says about itself: facts and warnings when it starts, and what became of it where that is not well."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax

from polygpt import checkpoint
from polygpt.checkpoint import NotFiniteError
from polygpt.data import Loader, MixedLoader
from polygpt.distributed import process_count
from polygpt.loading import CHECKPOINTS
from polygpt.model import Model
from polygpt.process import command_line, memory_not_kept
from polygpt.sharding import Scope, describe_mesh
from polygpt.training.config import RunConfig
from polygpt.training.optimizers import in_steps
from polygpt.training.run_folder import read_config


def facts(config: RunConfig, model: Model, loader: Loader | MixedLoader, scope: Scope | None = None) -> dict[str, Any]:
    """What is worth knowing about the run, by name."""
    device = jax.local_devices()[0]
    return {
        "device": f"{device.platform} ({device.device_kind})",
        **({"processes": f"{count}, on {jax.device_count()} devices"} if (count := process_count()) > 1 else {}),
        **({} if scope is None else {"mesh": describe_mesh(scope.mesh.shape)}),
        "attention": model.attention_implementation(),
        "tokens a step": config.training.batch_size * config.model.context_length,
        "steps an epoch": loader.num_batches,
        **loader.facts(config.training.steps),
    }


def warnings(config: RunConfig, model: Model, ids: int, scope: Scope | None = None) -> list[str]:
    """What may not be as the user meant it."""
    found = []
    vocab, steps, devices = config.model.vocab_size, config.training.steps, jax.local_devices()
    warmup = in_steps(getattr(config.training.schedule, "warmup_steps", 0), steps)
    if vocab > 1.5 * ids:  # padding to a round number is usual
        found.append(
            f"model.vocab_size={vocab} is far more than the tokenizer's {ids} ids: the rest is never seen; "
            "model.vocab_size= (empty) takes the tokenizer's"
        )
    if warmup >= steps:
        found.append(
            f"training.schedule.warmup_steps={warmup} is not shorter than the run (training.steps={steps}): the "
            "learning rate rises to the end and never decays; lower it"
        )
    every, kept = (in_steps(getattr(config.training, name), steps) for name in ("save_every", "keep_every"))
    if kept and every and kept % every:
        found.append(
            f"training.keep_every={kept} is no multiple of training.save_every={every}: it keeps only what is saved at "
            f"multiples of both, every {math.lcm(kept, every)} steps"
        )
    if config.training.optimizer.averages and config.training.schedule.decays:
        found.append(
            f"training.schedule.kind={config.training.schedule.kind} decays; {config.training.optimizer.kind} is meant "
            "for a constant learning rate: training.schedule.kind=constant"
        )
    if len(devices) > 1 and scope is None:
        found.append(
            f"{len(devices)} {devices[0].platform} devices are here; training uses one, the first (mesh=auto takes all)"
        )
    if devices[0].platform == "cpu" and (reason := memory_not_kept()):
        found.append(f"freed memory is given back in every step, which makes training slower: {reason}")
    return found + ([model.training_caveat] if model.training_caveat else [])


def diverged(error: NotFiniteError, out: Path) -> str:
    """What happened, what is kept, and the command to go on with."""
    config = read_config(out)
    optimizer = config.training.optimizer
    rate = min(optimizer.learning_rate / 2, type(optimizer).model_fields["learning_rate"].get_default() or math.inf)
    again = command_line("train", "--resume", "--out", out, f"training.optimizer.learning_rate={rate:g}")
    half = config.model.compute_dtype != "float32" or config.model.param_dtype != "float32"
    kept = checkpoint.describe_saved(out / CHECKPOINTS)
    advice = " (or start a new run in float32)" if half else ""
    return f"{error}: training diverged ({kept})\ngo on with a lower learning rate: {again}{advice}"


def unlearned(val_loss: float, ids: int) -> str | None:
    """What to say at the end if the model predicts no better than one that takes all `ids` for equally likely.

    A learning rate that is far too high ends there: weights that are finite, and without effect.
    """
    uniform = math.log(ids)
    if val_loss < uniform - 1e-3:
        return None
    return (
        f"the validation loss, {val_loss:.4f}, is no lower than that of guessing among the {ids:,} ids "
        f"({uniform:.4f}): the model has learned nothing; a lower training.optimizer.learning_rate or more steps may "
        "help"
    )
