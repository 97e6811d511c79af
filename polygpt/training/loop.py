"""The loop: batches in, events out, checkpoints that go on to the same numbers.

Progress bars, files and reports are listeners of the events; the loop itself prints and plots nothing.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polygpt import checkpoint
from polygpt.data import Loader
from polygpt.errors import RequestError
from polygpt.evaluation import EvaluationConfig, Ready
from polygpt.language_model import LanguageModel
from polygpt.loading import CHECKPOINTS, read_origin
from polygpt.model import Model
from polygpt.training.config import RunConfig
from polygpt.training.events import (
    Ended,
    Evaluated,
    Event,
    Finished,
    Listener,
    Measured,
    Note,
    RunResult,
    Sampled,
    Saved,
    Started,
)
from polygpt.training.initial import initial_params
from polygpt.training.interrupt import Interrupted, InterruptFlag
from polygpt.training.listeners import standard_listeners
from polygpt.training.meter import Meter
from polygpt.training.run_folder import Run, check_prompts, create_run, open_run, write_config
from polygpt.training.step import Batch, Trainer, TrainState, nll_sums


def train(
    config: RunConfig | None, out: str | Path, *, resume: bool = False, listeners: Iterable[Listener] | None = None
) -> RunResult:
    """Trains as `config` says into the folder `out`, or goes on with the run that is there.

    Args:
        config: the run's configuration; with `resume` it may be None for the run's own. Otherwise it must be the same
            model on the same data in the same batches and with the same kind of optimizer; the number of steps, the
            learning rate, its schedule and clipping may change.
        out: the run's folder.
        resume: go on from the newest verified checkpoint.
        listeners: called with each event (see `events.py`); by default those that write the run's metrics, samples
            and report and show a progress bar on standard error.

    Raises:
        RequestError: the folder exists (or, resuming, does not), the data or shapes do not fit, the run differs.
        PolygptError: writing failed, or the loss is no longer a number.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    started = time.perf_counter()
    out = Path(out).expanduser()
    emit = _emitter(standard_listeners() if listeners is None else listeners)
    try:
        return _Loop(_opened(config, out, resume, emit), emit, started).run(resume)
    finally:
        emit(Ended())


def _opened(config: RunConfig | None, out: Path, resume: bool, emit: Listener) -> Run:
    """The run in the folder `out`: the one that is there, or a new one with its data prepared."""
    if config is None and not resume:
        raise RequestError("a configuration is needed (such as polygpt.load_recipe('demo')), or resume=True")
    # What can be known of them now is: the data may take long to prepare.
    for index, evaluation in enumerate(config.training.evaluations if config is not None else ()):
        with _naming(index):
            evaluation.check()
    if not resume:
        return create_run(config, out, lambda text: emit(Note(text)), check=_check)
    run = open_run(out)
    return run if config is None else _with_changes(run, config)


def _emitter(listeners: Iterable[Listener]) -> Listener:
    listeners = tuple(listeners)

    def emit(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return emit


def _with_changes(run: Run, config: RunConfig) -> Run:
    """The run under `config`, which may train longer but must be the same model on the same data."""
    own = run.config
    for name in ("model", "tokenizer", "data"):
        mine, theirs = getattr(own, name), getattr(config, name)
        if name == "model":
            theirs = theirs.with_vocab(own.model.vocab_size)
        if mine != theirs:
            key, had, asked = _first_difference(mine.to_dict(), theirs.to_dict(), name)
            raise RequestError(
                f"{run.folder}: this run has {key}={had}, not {asked}; "
                "resume without changing it, or start a new run with another --out"
            )
    changed = dataclasses.replace(run, config=own.replace(training=config.training.to_dict()))
    check_prompts(changed)
    return changed


def _first_difference(mine: Any, theirs: Any, key: str) -> tuple[str, Any, Any]:
    """The dotted key at which two plain configurations first differ, and both values."""
    if isinstance(mine, dict) and isinstance(theirs, dict) and set(mine) == set(theirs):
        name = next(name for name in mine if mine[name] != theirs[name])
        return _first_difference(mine[name], theirs[name], f"{key}.{name}")
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        index = next(i for i, value in enumerate(mine) if value != theirs[i])
        return _first_difference(mine[index], theirs[index], f"{key}.{index}")
    return key, mine, theirs


def _check(run: Run) -> None:
    """Refuses a run whose data is shorter than a window or whose model cannot be built, before it is written."""
    _loaders(run)
    _evaluations(run)
    model = Model(run.config.model)
    model.check()
    model.attention_implementation()  # refuses one that cannot run here


def _evaluations(run: Run) -> list[tuple[EvaluationConfig, Ready]]:
    """What `training.evaluations` asks for, its data read and found to fit the run's model."""
    found = []
    for index, evaluation in enumerate(run.config.training.evaluations):
        with _naming(index):
            found.append((evaluation, evaluation.prepare(run.tokenizer, run.config.model.context_length)))
    return found


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """Names the evaluation that a refusal is about."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"training.evaluations.{index}: {error}") from None


def _loaders(run: Run) -> tuple[Loader, Loader]:
    """Training batches and validation batches of a run."""
    training, context = run.config.training, run.config.model.context_length
    train = Loader(
        run.shards.train,
        context_length=context,
        batch_size=training.batch_size,
        stride=run.config.data.stride,
        seed=training.seed,
    )
    held_out = Loader(run.shards.validation, context_length=context, batch_size=training.batch_size, shuffle=False)
    return train, held_out


class _Loop:
    """One process's work on one run."""

    def __init__(self, run: Run, emit: Listener, started: float):
        self.started = started
        self.folder, self.tokenizer, self.emit = run.folder, run.tokenizer, emit
        self.config, self.training = run.config, run.config.training
        self.train_loader, self.validation_loader = _loaders(run)
        self.evaluations = _evaluations(run)
        self.tokens_per_byte = run.shards.validation.tokens / run.shards.validation.bytes
        self.model = Model(run.config.model)
        self.trainer = Trainer(self.model, self.training)
        self.sums = jax.jit(lambda params, batch: nll_sums(self.model, params, batch))
        self.meter = Meter(emit, self.training.batch_size * run.config.model.context_length)

    def run(self, resume: bool) -> RunResult:
        """The whole of it: from the newest checkpoint, if resuming, to the last step's."""
        with InterruptFlag() as interrupt:
            state = self._restore() if resume else self._start()
            write_config(self.folder, self.config)  # a resumed run may go on for more steps
            self.emit(Started(self.config, self.folder, int(state.step), self.model.num_parameters, self._facts()))
            compile_seconds = 0.0
            if int(state.step) < self.training.steps:
                before = time.perf_counter()
                step_function = self.trainer.compile_step(state, self._batch(self.train_loader, 0))
                compile_seconds = time.perf_counter() - before
                self.emit(Note(f"compiled in {compile_seconds:.1f} s"))
                state = self._steps(state, step_function, interrupt)
            evaluated = self._evaluate(state, full=True)
            self._measure(state)
        result = RunResult(
            run=str(self.folder),
            steps=int(state.step),
            train_loss=self.meter.recent_loss,
            val_loss=evaluated.val_loss,
            val_bits_per_byte=evaluated.val_bits_per_byte,
            tokens_per_second=self.meter.tokens_per_second,
            seconds=time.perf_counter() - self.started,
            compile_seconds=compile_seconds,
        )
        self.emit(Finished(result))
        return result

    def _steps(self, state: TrainState, step_function: Callable, interrupt: InterruptFlag) -> TrainState:
        self.meter.restart()
        for index in range(int(state.step), self.training.steps):
            state, metrics = step_function(state, self._batch(self.train_loader, index))
            self.meter.add(index + 1, metrics)
            step, last = index + 1, index + 1 == self.training.steps
            if step % self.training.log_every == 0:
                self.meter.flush()
            if _due(step, self.training.eval_every) and not last:
                self._evaluate(state)
            if not last:
                self._measure(state, step)
            if _due(step, self.training.samples.every) or (last and self.training.samples.every):
                self._sample(state, step)
            if interrupt.raised or last or _due(step, self.training.save_every):
                self._save(state, step)
            if interrupt.raised and not last:
                raise Interrupted(step, self.folder)
        return state

    def _batch(self, loader: Loader, index: int) -> Batch:
        return Batch(**{name: jnp.asarray(values) for name, values in loader.batch(index).items()})

    def _evaluate(self, state: TrainState, full: bool = False) -> Evaluated:
        """On all validation windows, or on batches spread evenly over them, the same ones every time."""
        self.meter.flush()
        count = self.validation_loader.num_batches
        wanted = count if full else min(self.training.eval_batches or count, count)
        indices = np.linspace(0, count - 1, wanted).round().astype(int)
        # Summed on the device: fetching each would wait for it.
        total = sum(self.sums(state.params, self._batch(self.validation_loader, int(i))) for i in indices)
        nats, tokens = np.asarray(total, np.float64)
        loss = float(nats / tokens)
        bits = loss * self.tokens_per_byte / math.log(2)
        event = Evaluated(int(state.step), loss, bits, full=wanted == count)
        self.emit(event)
        self.meter.restart()
        return event

    def _measure(self, state: TrainState, step: int | None = None) -> None:
        """What `training.evaluations` asks for at `step`; all of it at the end (None)."""
        due = [(asked, ready) for asked, ready in self.evaluations if step is None or _due(step, asked.every)]
        if not due:
            return
        self.meter.flush()
        lm = self._language_model(state)
        for asked, ready in due:
            outcome = ready(lm, lambda done, total: None)
            metrics = {f"{asked.title}/{name}": value for name, value in outcome.metrics.items()}
            self.emit(Measured(int(state.step), metrics))
        self.meter.restart()

    def _language_model(self, state: TrainState) -> LanguageModel:
        """The model as it stands, with what came with the one that training started from."""
        return LanguageModel(self.config.model, state.params, self.tokenizer, read_origin(self.folder))

    def _sample(self, state: TrainState, step: int) -> None:
        self.meter.flush()
        settings = self.training.samples
        lm = self._language_model(state)
        for prompt in settings.prompts:
            text = lm.generate(
                prompt,
                max_new_tokens=min(settings.max_new_tokens, self.config.model.context_length),
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=settings.seed,
            ).text
            self.emit(Sampled(step, prompt, text))
        self.meter.restart()

    def _save(self, state: TrainState, step: int) -> None:
        self.meter.flush()  # raises where the state is not worth saving
        items = {"params": state.params, "optimizer": (state.optimizer, state.step)}
        info = {"step": step, "data": self.train_loader.fingerprint, "recent_losses": list(self.meter.recent)}
        info["tokens_per_second"] = self.meter.tokens_per_second
        saved = checkpoint.save(self.folder / CHECKPOINTS, step, items, info, self.training.keep)
        self.emit(Saved(step, saved.folder))
        self.meter.restart()

    def _start(self) -> TrainState:
        """The state before the first step: new weights, or those of `training.initial`."""
        if self.training.initial is None:
            return self.trainer.init()
        self.emit(Note(f"weights: from {self.training.initial}"))
        return self.trainer.init(initial_params(self.config))

    def _restore(self) -> TrainState:
        saved = checkpoint.newest(self.folder / CHECKPOINTS, lambda text: self.emit(Note(text, warning=True)))
        if saved is None:
            self.emit(Note("no checkpoint yet: starting from the first step"))
            return self._start()
        if saved.info["data"] != self.train_loader.fingerprint:
            raise RequestError(
                f"{self.folder}: the checkpoint was trained on other batches (data, batch_size, context_length, "
                "stride or seed differ); resume with the run's own settings"
            )
        if saved.step > self.training.steps:
            raise RequestError(
                f"{self.folder}: the run is past training.steps={self.training.steps} (step {saved.step} is saved); "
                "give more steps, or start a new run with another --out"
            )
        like = self.trainer.abstract_state()
        params = checkpoint.restore(saved, "params", like.params)
        optimizer, step = checkpoint.restore(saved, "optimizer", (like.optimizer, like.step))
        self.meter.recent.extend(saved.info["recent_losses"])
        self.meter.speeds.append(saved.info["tokens_per_second"])
        return TrainState(self.trainer.place(params), optimizer, step)

    def _facts(self) -> dict[str, Any]:
        device = jax.local_devices()[0]
        vocab, ids = self.config.model.vocab_size, self.tokenizer.vocab_size
        if vocab > 1.5 * ids:  # padding to a round number is usual
            self.emit(
                Note(
                    f"model.vocab_size={vocab} is far more than the tokenizer's {ids} ids: the rest is never seen; "
                    "model.vocab_size= (empty) takes the tokenizer's",
                    warning=True,
                )
            )
        if self.model.training_caveat:
            self.emit(Note(self.model.training_caveat, warning=True))
        return {
            "device": f"{device.platform} ({device.device_kind})",
            "attention": self.model.attention_implementation(),
            "tokens a step": self.training.batch_size * self.config.model.context_length,
            "steps an epoch": self.train_loader.num_batches,
        }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
