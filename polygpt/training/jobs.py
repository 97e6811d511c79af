"""Periodic jobs of a run: validation, further evaluations and samples (checkpoints are in `saving.py`).

Each is done every so many steps and at the end of training. To add one, write a class with `every` and `run` and add it
to the list in `loop.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from polygpt import checkpoint
from polygpt.data import Loader
from polygpt.distributed import process_count
from polygpt.errors import PolygptError
from polygpt.evaluation import EvaluationConfig, Ready
from polygpt.language_model import LanguageModel
from polygpt.loading import read_origin
from polygpt.model import Params, model_of
from polygpt.sharding import Scope, use_mesh
from polygpt.training.events import Evaluated, Listener, Measured, Sampled
from polygpt.training.optimizers import in_steps
from polygpt.training.prompts import prompts_of
from polygpt.training.run_folder import Run
from polygpt.training.state import Batch, TrainState
from polygpt.training.step import nll_sums

Weights = Callable[[TrainState], Params]
"""Which weights of the state are evaluated: `Trainer.evaluated`."""
Current = Callable[[TrainState], LanguageModel]


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

    def __init__(self, run: Run, weights: Weights, emit: Listener, scope: Scope | None = None):
        self.weights, self.scope = weights, scope
        training, self.emit, self.loader = run.config.training, emit, run.validation_loader
        self.every = in_steps(training.eval_every, training.steps)
        self.sources, self.batches = run.source_loaders, training.eval_batches
        self.text = run.shards.validation.fingerprint[:12]
        model = model_of(run.config.model)
        self.sums = jax.jit(
            lambda params, batch: nll_sums(model, params, batch),
            out_shardings=None if scope is None else scope.replicated,
        )

    def run(self, state: TrainState, last: bool) -> None:
        step, found = int(state.step), self._measure(self.loader, state, last)
        self.latest = Evaluated(step, found.loss, found.bits_per_byte, found.full)
        self.compared = found.compared
        self.emit(self.latest)
        for name, loader in self.sources.items():
            found = self._measure(loader, state, last)
            metrics = {f"{name}/val_loss": found.loss, f"{name}/val_bits_per_byte": found.bits_per_byte}
            self.emit(Measured(step, metrics))

    def _measure(self, loader: Loader, state: TrainState, last: bool) -> _Measurement:
        count = loader.num_batches
        every = np.linspace(0, count - 1, min(self.batches or count, count)).round().astype(int)
        indices = np.arange(count) if last else every
        weights, sums = self.weights(state), {}
        for previous, index in zip([None, *indices[:-1]], indices, strict=True):
            with use_mesh(self.scope):
                sums[index] = self.sums(weights, Batch.read(loader, int(index), self.scope))
            if previous is not None:  # at most two are computed ahead, so that an interruption need not wait for all
                jax.block_until_ready(sums[previous])
        loss = _mean(sums.values())
        if not math.isfinite(loss):
            raise checkpoint.NotFiniteError(f"step {int(state.step)}: validation loss {loss}")
        bits = loss * loader.split.tokens / loader.split.bytes / math.log(2)
        return _Measurement(loss, bits, len(indices) == count, _mean(sums[index] for index in every))


class _Measurement(NamedTuple):
    """Nats per token, bits per byte, whether they are of all windows, and the loss on those that are always read."""

    loss: float
    bits_per_byte: float
    full: bool
    compared: float


def _mean(sums: Iterable[jax.Array]) -> float:
    """Mean nats per token of batches' sums."""
    nats, tokens = np.sum(np.asarray(jax.device_get(list(sums)), np.float64), 0)
    return float(nats / tokens)


class Evaluation:
    """One of `training.evaluations`."""

    def __init__(
        self, config: EvaluationConfig, ready: Ready, lm: Callable[[TrainState], LanguageModel], emit: Listener
    ):
        self.every, self.title, self.ready, self.lm, self.emit = config.every, config.title, ready, lm, emit

    def run(self, state: TrainState, last: bool) -> None:
        lm = self.lm(state)
        with use_mesh(lm.scope):
            outcome = self.ready(lm, lambda done, total: None)
        metrics = {f"{self.title}/{name}": value for name, value in outcome.metrics.items()}
        self.emit(Measured(int(state.step), metrics))


class Samples:
    """Text that continues each of the prompts."""

    def __init__(self, run: Run, lm: Current, emit: Listener):
        self.settings, self.lm, self.emit = run.config.training.samples, lm, emit
        self.every = in_steps(self.settings.every, run.config.training.steps)
        context = run.config.model.context_length
        self.prompts = prompts_of(self.settings, run.tokenizer, run.shards, context) if self.every else ()
        self.max_new_tokens = min(self.settings.max_new_tokens, context)

    def run(self, state: TrainState, last: bool) -> None:
        lm, step = self.lm(state), int(state.step)
        for prompt in self.prompts:
            try:
                text = lm.generate(
                    prompt,
                    max_new_tokens=self.max_new_tokens,
                    temperature=self.settings.temperature,
                    top_p=self.settings.top_p,
                    seed=self.settings.seed,
                ).text
            except PolygptError:  # the prompts are in order: the logits are not
                raise checkpoint.NotFiniteError(f"step {step}: the logits of a sample are not finite") from None
            self.emit(Sampled(step, prompt, text))


def language_models(run: Run, weights: Weights, scope: Scope | None = None) -> Current:
    """A function from the state to the run's language model.

    Of several processes, each has the whole model on its first device.
    """
    origin, several = read_origin(run.folder), process_count() > 1

    def current(state: TrainState) -> LanguageModel:
        params = on_one_device(weights(state)) if several else weights(state)
        return LanguageModel(run.config.model, params, run.tokenizer, origin, scope=None if several else scope)

    return current


def on_one_device(params: Params) -> Params:
    """Parameters that are spread over several processes, copied to the first device of each."""
    replicated = jax.tree.map(lambda leaf: NamedSharding(leaf.sharding.mesh, PartitionSpec()), params)
    whole = jax.jit(lambda tree: tree, out_shardings=replicated)(params)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)
