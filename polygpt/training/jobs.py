"""Periodic jobs of a run: validation, further evaluations, samples and checkpoints.

Each is done every so many steps and at the end of training. To add one, write a class with `every` and `run` and add it
to the list in `loop.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import jax
import numpy as np

from polygpt import checkpoint
from polygpt.data import Loader
from polygpt.evaluation import EvaluationConfig, Ready
from polygpt.language_model import LanguageModel
from polygpt.loading import CHECKPOINTS, read_origin
from polygpt.model import Params, model_of
from polygpt.training.events import Evaluated, Listener, Measured, Sampled, Saved
from polygpt.training.meter import Meter
from polygpt.training.optimizers import in_steps
from polygpt.training.prompts import prompts_of
from polygpt.training.run_folder import Run
from polygpt.training.step import Batch, TrainState, nll_sums


class Job(Protocol):
    """Something done every `every` steps (0: only at the end)."""

    every: int

    def run(self, state: TrainState, last: bool) -> None:
        """Does it; `last` says that training is complete."""
        ...


def is_due(job: Job, step: int) -> bool:
    """Whether a job is due after `step` steps."""
    return job.every > 0 and step % job.every == 0


class Validation:
    """Loss on the validation windows: during training on some of them, the same every time; at the end on all.

    Of a mixture, each source is measured by itself as well.
    """

    def __init__(self, run: Run, emit: Listener):
        training, self.emit, self.loader = run.config.training, emit, run.validation_loader
        self.every = in_steps(training.eval_every, training.steps)
        self.sources, self.batches = run.source_loaders, training.eval_batches
        model = model_of(run.config.model)
        self.sums = jax.jit(lambda params, batch: nll_sums(model, params, batch))

    def run(self, state: TrainState, last: bool) -> None:
        step = int(state.step)
        loss, bits, full = self._measure(self.loader, state, last)
        self.latest = Evaluated(step, loss, bits, full)
        self.emit(self.latest)
        for name, loader in self.sources.items():
            loss, bits, _ = self._measure(loader, state, last)
            self.emit(Measured(step, {f"{name}/val_loss": loss, f"{name}/val_bits_per_byte": bits}))

    def _measure(self, loader: Loader, state: TrainState, last: bool) -> tuple[float, float, bool]:
        """Nats per token, bits per byte, and whether they are of all windows."""
        count = loader.num_batches
        wanted = count if last else min(self.batches or count, count)
        indices = np.linspace(0, count - 1, wanted).round().astype(int)
        # Summed on the device: fetching each batch's sums would wait for it.
        total = sum(self.sums(state.params, Batch.of(loader.batch(int(i)))) for i in indices)
        nats, tokens = np.asarray(total, np.float64)
        loss = float(nats / tokens)
        if not math.isfinite(loss):
            raise checkpoint.NotFiniteError(f"step {int(state.step)}: validation loss {loss}")
        return loss, loss * loader.split.tokens / loader.split.bytes / math.log(2), wanted == count


class Evaluation:
    """One of `training.evaluations`."""

    def __init__(self, config: EvaluationConfig, ready: Ready, lm: Callable[[Params], LanguageModel], emit: Listener):
        self.every, self.title, self.ready, self.lm, self.emit = config.every, config.title, ready, lm, emit

    def run(self, state: TrainState, last: bool) -> None:
        outcome = self.ready(self.lm(state.params), lambda done, total: None)
        metrics = {f"{self.title}/{name}": value for name, value in outcome.metrics.items()}
        self.emit(Measured(int(state.step), metrics))


class Samples:
    """Text that continues each of the prompts."""

    def __init__(self, run: Run, lm: Callable[[Params], LanguageModel], emit: Listener):
        self.settings, self.lm, self.emit = run.config.training.samples, lm, emit
        self.every = in_steps(self.settings.every, run.config.training.steps)
        context = run.config.model.context_length
        self.prompts = prompts_of(self.settings, run.tokenizer, run.shards, context) if self.every else ()
        self.max_new_tokens = min(self.settings.max_new_tokens, context)

    def run(self, state: TrainState, last: bool) -> None:
        lm = self.lm(state.params)
        for prompt in self.prompts:
            text = lm.generate(
                prompt,
                max_new_tokens=self.max_new_tokens,
                temperature=self.settings.temperature,
                top_p=self.settings.top_p,
                seed=self.settings.seed,
            ).text
            self.emit(Sampled(int(state.step), prompt, text))


class Saving:
    """A checkpoint."""

    def __init__(self, run: Run, meter: Meter, emit: Listener):
        training = run.config.training
        self.every, self.keep = in_steps(training.save_every, training.steps), training.keep
        self.root, self.data = run.folder / CHECKPOINTS, run.train_loader.fingerprint
        self.meter, self.emit = meter, emit
        self.saved_step: int | None = None

    def run(self, state: TrainState, last: bool) -> None:
        step, losses = int(state.step), tuple(self.meter.recent)
        snapshot = checkpoint.Snapshot(
            step, state.params, state.optimizer, self.data, losses, self.meter.tokens_per_second
        )
        saved = checkpoint.save(self.root, snapshot, self.keep)
        self.saved_step = step
        self.emit(Saved(step, saved.folder))


def language_models(run: Run) -> Callable[[Params], LanguageModel]:
    """A function from parameters to the run's language model."""
    origin = read_origin(run.folder)
    return lambda params: LanguageModel(run.config.model, params, run.tokenizer, origin)
