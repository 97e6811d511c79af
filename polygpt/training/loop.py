"""The loop: batches in, events out, and periodic jobs between steps.

It prints and plots nothing: progress bars, files and reports listen to the events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from polygpt import checkpoint
from polygpt.checkpoint import NotFiniteError
from polygpt.errors import PolygptError, RequestError
from polygpt.loading import CHECKPOINTS
from polygpt.model import Model, model_of
from polygpt.process import memory_not_kept
from polygpt.training.config import RunConfig
from polygpt.training.events import Compiled, Ended, Event, Finished, Listener, Note, RunResult, Started
from polygpt.training.initial import initial_changes, initial_params
from polygpt.training.interrupt import Interrupted, InterruptFlag
from polygpt.training.jobs import Evaluation, Job, Samples, Saving, Validation, is_due, language_models
from polygpt.training.listeners import standard_listeners
from polygpt.training.meter import Meter
from polygpt.training.optimizers import in_steps
from polygpt.training.resume import with_changes
from polygpt.training.run_folder import Run, create_run, naming, open_run, write_config
from polygpt.training.step import Batch, Trainer, TrainState


def train(
    config: RunConfig | None, out: str | Path, *, resume: bool = False, listeners: Iterable[Listener] | None = None
) -> RunResult:
    """Trains as `config` says into the folder `out`, or continues the run that is there.

    Args:
        config: the run's configuration; with `resume`, None means the run's own. A given one must be of the same
            architecture on the same data, in the same batches, with the same kind of optimizer; how the model is
            computed, the number of steps, the learning rate and whatever else concerns training alone may change.
        out: the run's folder.
        resume: continue from the newest verified checkpoint.
        listeners: called with each event (see `events.py`); by default those that write the run's metrics, samples
            and report and show a progress bar on standard error.

    Raises:
        RequestError: the folder exists (or, resuming, does not), the data or shapes do not fit, the run differs.
        PolygptError: writing failed, or a loss, a gradient or a parameter is no longer a finite number.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    started = time.perf_counter()
    out = Path(out).expanduser()
    emit = _emitter(standard_listeners() if listeners is None else listeners)
    try:
        return _Loop(_opened(config, out, resume, emit), emit, started).run(resume)
    except NotFiniteError as error:
        kept = checkpoint.describe_saved(out / CHECKPOINTS)
        raise PolygptError(
            f"{error}: training diverged; lower training.optimizer.learning_rate, or use float32 ({kept})"
        ) from error
    finally:
        emit(Ended())


def _opened(config: RunConfig | None, out: Path, resume: bool, emit: Listener) -> Run:
    """The run in the folder `out`: the existing one, or a new one with its data prepared."""
    if config is None and not resume:
        raise RequestError("a configuration is needed (such as polygpt.load_recipe('demo')), or resume=True")
    if config is not None and not isinstance(config, RunConfig):
        raise RequestError(f"train takes a RunConfig, such as polygpt.load_recipe('demo'), not {config!r:.60}")
    # Mistakes in these are found first: preparing the data may take long.
    for index, evaluation in enumerate(config.training.evaluations if config is not None else ()):
        with naming(f"training.evaluations.{index}"):
            evaluation.check()

    def note(text: str) -> None:
        emit(Note(text))

    if not resume:
        return create_run(config, out, note, check=_check)
    run = open_run(out, note)
    if config is not None:
        run, changes = with_changes(run, config)
        if changes:
            note(f"changed: {', '.join(changes)}")
    return run


def _emitter(listeners: Iterable[Listener]) -> Listener:
    listeners = tuple(listeners)

    def emit(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return emit


def _check(run: Run) -> None:
    """Refuses a run whose data is too short or whose model cannot be built, before its folder is written."""
    run.train_loader.facts(run.config.training.steps)  # refuses sources that do not last so long
    _ = run.validation_loader, run.source_loaders, run.evaluations
    model = model_of(run.config.model)
    model.check()
    model.attention_implementation()  # refuses one that cannot run here


class _Loop:
    """One process's work on one run."""

    def __init__(self, run: Run, emit: Listener, started: float):
        self.started, self.folder, self.emit = started, run.folder, emit
        self.config, self.training, self.loader = run.config, run.config.training, run.train_loader
        self.vocabulary = run.tokenizer.vocab_size
        self.model = model_of(run.config.model)
        self.trainer = Trainer(self.model, self.training)
        self.meter = Meter(emit, self.training.batch_size * run.config.model.context_length)
        lm = language_models(run)
        self.validation, self.saving = Validation(run, emit), Saving(run, self.meter, emit)
        samples = Samples(run, lm, emit)
        evaluations = [Evaluation(config, ready, lm, emit) for config, ready in run.evaluations]
        # Saving comes last between steps, so that a checkpoint never lacks an evaluation of its step; and first at the
        # end, where evaluating everything may take long.
        self.jobs: list[Job] = [self.validation, *evaluations, samples, self.saving]
        self.last_jobs: list[Job] = [samples, self.saving]
        self.evaluations: list[Job] = [self.validation, *evaluations]

    def run(self, resume: bool) -> RunResult:
        """Trains from the first step, or the newest checkpoint, to the last."""
        with InterruptFlag() as interrupt:
            state = self._restore() if resume else self._start()
            write_config(self.folder, self.config)  # settings may have changed on resuming
            for text in _warnings(self.config, self.model, self.vocabulary):
                self._warn(text)
            self.emit(Started(self.config, self.folder, int(state.step), self.model.num_parameters, self._facts()))
            compile_seconds = 0.0
            if int(state.step) < self.training.steps:
                before = time.perf_counter()
                step_function = self.trainer.compile_step(state, Batch.of(self.loader.batch(0)))
                compile_seconds = time.perf_counter() - before
                self.emit(Compiled(compile_seconds))
                state = self._steps(state, step_function, interrupt)
            self._do(self.evaluations, state, last=True)
        result = RunResult(
            run=str(self.folder),
            steps=int(state.step),
            train_loss=self.meter.recent_loss,
            val_loss=self.validation.latest.val_loss,
            val_bits_per_byte=self.validation.latest.val_bits_per_byte,
            tokens_per_second=self.meter.tokens_per_second,
            seconds=time.perf_counter() - self.started,
            compile_seconds=compile_seconds,
        )
        self.emit(Finished(result))
        return result

    def _steps(self, state: TrainState, step_function: Callable, interrupt: InterruptFlag) -> TrainState:
        self.meter.restart()
        for step in range(int(state.step) + 1, self.training.steps + 1):
            state, metrics = step_function(state, Batch.of(self.loader.batch(step - 1)))
            self.meter.add(step, metrics)
            if step == self.training.steps:
                break
            if step % self.training.log_every == 0:
                self.meter.flush()
            self._do([job for job in self.jobs if is_due(job, step)], state)
            if interrupt.raised:
                if self.saving.saved_step != step:
                    self._do([self.saving], state)
                raise Interrupted(step, self.folder)
        self._do(self.last_jobs, state, last=True)
        return state

    def _do(self, jobs: list[Job], state: TrainState, last: bool = False) -> None:
        """Runs jobs, none of which counts as training time."""
        if not jobs:
            return
        self.meter.flush()  # raises if the state is not worth evaluating or saving
        for job in jobs:
            job.run(state, last)
        self.meter.restart()

    def _start(self) -> TrainState:
        """The state before the first step: new weights, or those of `training.initial`."""
        if self.training.initial is None:
            return self.trainer.init()
        changes = initial_changes(self.config)
        self.emit(Note(f"weights: from {self.training.initial}" + (f", with {', '.join(changes)}" if changes else "")))
        return self.trainer.init(initial_params(self.config))

    def _restore(self) -> TrainState:
        """The state of the newest checkpoint that is intact and finite; the first state if there is none."""
        for saved in checkpoint.verified(self.folder / CHECKPOINTS, self._warn):
            self._check_resumable(saved)
            like = self.trainer.abstract_state()
            try:
                snapshot = checkpoint.restore(saved, like.params, like.optimizer)
            except NotFiniteError as error:
                self._warn(f"{error}; trying the step before it")
                continue
            self.meter.recent.extend(snapshot.recent_losses)
            self.meter.speeds.append(snapshot.tokens_per_second)
            step = jax.numpy.int32(snapshot.step)
            return TrainState(self.trainer.place(snapshot.params), snapshot.optimizer, step)
        if any((self.folder / CHECKPOINTS).glob("step_*")):
            self._warn("no checkpoint is usable: training starts again from the first step")
        else:
            self.emit(Note("no checkpoint yet: starting from the first step"))
        return self._start()

    def _check_resumable(self, saved: checkpoint.Checkpoint) -> None:
        if saved.info["data"] != self.loader.fingerprint:
            raise RequestError(
                f"{self.folder}: the checkpoint was trained on other batches (data, batch_size, context_length, "
                "stride or seed differ); resume with the run's own settings"
            )
        if saved.step > self.training.steps:
            raise RequestError(
                f"{self.folder}: the run is past training.steps={self.training.steps} (step {saved.step} is saved); "
                "give more steps, or start a new run with another --out"
            )

    def _warn(self, text: str) -> None:
        self.emit(Note(text, warning=True))

    def _facts(self) -> dict[str, Any]:
        device = jax.local_devices()[0]
        return {
            "device": f"{device.platform} ({device.device_kind})",
            "attention": self.model.attention_implementation(),
            "tokens a step": self.training.batch_size * self.config.model.context_length,
            "steps an epoch": self.loader.num_batches,
            **self.loader.facts(self.training.steps),
        }


def _warnings(config: RunConfig, model: Model, ids: int) -> list[str]:
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
    if len(devices) > 1:
        found.append(f"{len(devices)} {devices[0].platform} devices are here; training uses one, the first")
    if devices[0].platform == "cpu" and (reason := memory_not_kept()):
        found.append(f"freed memory is given back in every step, which makes training slower: {reason}")
    return found + ([model.training_caveat] if model.training_caveat else [])
