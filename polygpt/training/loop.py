"""The loop: batches in, events out, and periodic jobs between steps.

It prints and plots nothing: progress bars, files and reports listen to the events.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from polygpt import checkpoint
from polygpt.checkpoint import NotFiniteError
from polygpt.distributed import collective_errors, exchange, is_main, shared_folder, watching
from polygpt.errors import PolygptError, RequestError
from polygpt.files import expand
from polygpt.folders import CONFIG
from polygpt.loading import CHECKPOINTS
from polygpt.model import model_of
from polygpt.training.config import RunConfig
from polygpt.training.devices import Utilization
from polygpt.training.events import Compiled, Ended, Finished, Listener, Note, RunResult, Started, emitter
from polygpt.training.facts import diverged, facts, unlearned, warnings
from polygpt.training.interrupt import Interrupted, InterruptFlag, Stop
from polygpt.training.jobs import Evaluation, Job, Samples, Validation, is_due, language_models
from polygpt.training.listeners import standard_listeners
from polygpt.training.listeners.trackers import check_trackers
from polygpt.training.mesh import check_devices, mesh_of
from polygpt.training.meter import Meter
from polygpt.training.multiprocess import check_same_request, finished_by_all, opened_by_all
from polygpt.training.optimizers import ParameterGroups
from polygpt.training.profiling import Profile
from polygpt.training.restoring import Restoring
from polygpt.training.resume import with_changes
from polygpt.training.run_folder import Run, create_run, naming, open_run, write_config
from polygpt.training.saving import Saving
from polygpt.training.state import Batch, TrainState
from polygpt.training.step import Trainer


def train(
    config: RunConfig | None,
    out: str | Path,
    *,
    resume: bool = False,
    listeners: Iterable[Listener] | None = None,
    profile: Profile | None = None,
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
        profile: the steps to trace into the run's folder.

    Raises:
        RequestError: the folder exists (or, resuming, does not), the data or shapes do not fit, the run differs.
        PolygptError: writing failed, or a loss, a gradient or a parameter is no longer a finite number.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    started = time.perf_counter()
    out = expand(out)
    if not is_main():  # one process writes and reports for all
        listeners, profile = (), None
    emit = emitter(standard_listeners() if listeners is None else listeners)
    try:
        if profile is not None and config is not None:
            profile.check(config.training.steps)
        with watching(), _locked(out, resume) as lock:
            check_same_request(config, out, resume)
            with shared_folder(out if resume else out.absolute().parent, f"--out {out}"):
                run = _opened(config, out, resume, emit) if is_main() else None
            if is_main() and not resume:
                lock.enter_context(checkpoint.folder_lock(out))
            run = opened_by_all(run, config, out, resume)
            done = finished_by_all(out, run.config.training.steps) if resume else None
            if done is not None:
                emit(Note(f"already done: {done.steps} steps; give more (training.steps={2 * done.steps}) to go on"))
                return done
            if is_main():
                checkpoint.remove_partial(out / CHECKPOINTS)
            with collective_errors():
                return _Loop(run, emit, started, profile).run(resume)
    except NotFiniteError as error:
        raise PolygptError(diverged(error, out)) from error
    finally:
        emit(Ended())


@contextmanager
def _locked(out: Path, resume: bool) -> Iterator[ExitStack]:
    """Holds the lock of an existing run; that of a new one is taken once its folder is there."""
    with ExitStack() as stack:
        if is_main() and resume and (out / CONFIG).is_file():  # whoever opens it says what is wrong otherwise
            stack.enter_context(checkpoint.folder_lock(out))
        yield stack


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
    check_trackers(config.training.trackers if config is not None else ())
    if config is not None:
        check_devices(config)

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


def _check(run: Run) -> None:
    """Refuses a run whose data is too short or whose model cannot be built, before its folder is written."""
    run.train_loader.facts(run.config.training.steps)  # refuses sources that do not last so long
    _ = run.validation_loader, run.source_loaders, run.evaluations
    model = model_of(run.config.model)
    model.check()
    mesh_of(run.config, model)
    model.attention_implementation()  # refuses one that cannot run here
    ParameterGroups(model.parameters, run.config.training.groups)


class _Loop:
    """One process's work on one run."""

    def __init__(self, run: Run, emit: Listener, started: float, profile: Profile | None = None):
        self.profile = profile
        self.started, self.folder, self.emit = started, run.folder, emit
        self.config, self.training, self.loader = run.config, run.config.training, run.train_loader
        self.vocabulary = run.tokenizer.vocab_size
        self.model = model_of(run.config.model)
        self.scope = mesh_of(run.config, self.model, emit)
        self.trainer = Trainer(self.model, self.training, self.scope)
        tokens = self.training.batch_size * run.config.model.context_length
        devices = 1 if self.scope is None else self.scope.mesh.size
        self.meter = Meter(emit, tokens, self.training.on_spike == "rollback", Utilization(self.model, devices))
        lm = language_models(run, self.trainer.evaluated, self.scope)
        self.validation = Validation(run, self.trainer.evaluated, emit, self.scope)
        self.saving = Saving(run, self.trainer, self.meter, emit)
        self.restoring = Restoring(run, self.trainer, self.meter, self.saving, emit)
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
            self.interrupt = interrupt
            state = self.restoring.newest() if resume else self._started()
            if self.profile is not None:
                self.profile.check(self.training.steps, int(state.step))
            if is_main():
                write_config(self.folder, self.config)  # settings may have changed on resuming
            for text in warnings(self.config, self.model, self.vocabulary, self.scope):
                self._warn(text)
            self.emit(
                Started(
                    self.config,
                    self.folder,
                    int(state.step),
                    self.model.num_parameters,
                    facts(self.config, self.model, self.loader, self.scope),
                    held_out=self.validation.text,
                )
            )
            try:
                state, compile_seconds = self._train(state)
                with self.interrupt.at_once():  # everything is saved; resuming evaluates
                    self._do(self.evaluations, state, last=True)
            except Stop:
                self._stop(state)
            except PolygptError:
                self.saving.writer.wait()  # the last step may still be being written
                raise
        result = RunResult(
            run=str(self.folder),
            steps=int(state.step),
            train_loss=self.meter.recent_loss,
            val_loss=self.validation.latest.val_loss,
            val_bits_per_byte=self.validation.latest.val_bits_per_byte,
            tokens_per_second=self.meter.tokens_per_second,
            seconds=time.perf_counter() - self.started,
            compile_seconds=compile_seconds,
            warning=unlearned(self.validation.latest.val_loss, self.vocabulary),
        )
        if result.warning is not None:
            self._warn(result.warning)
        if (text := self.saving.overfitting()) is not None:
            self._warn(text)
        self.emit(Finished(result))
        return result

    def _started(self) -> TrainState:
        """The first state of a new run. If the weights it starts from are refused, its folder goes, too."""
        try:
            return self.restoring.start()
        except RequestError:
            if is_main():
                shutil.rmtree(self.folder)
            raise

    def _train(self, state: TrainState) -> tuple[TrainState, float]:
        """The state after the last step, and the seconds that compilation took."""
        if int(state.step) >= self.training.steps:
            return state, 0.0
        before = time.perf_counter()
        step_function = self.trainer.compile_step(state, Batch.read(self.loader, 0, self.scope))
        exchange("compiled", None)  # gloo gives up if processes make their first connection 30 s apart
        seconds = time.perf_counter() - before
        self.emit(Compiled(seconds))
        if self.interrupt.raised:
            self._stop(state)
        return self._steps(state, step_function), seconds

    def _steps(self, state: TrainState, step_function: Callable) -> TrainState:
        self.meter.restart()
        step = int(state.step)
        while step < self.training.steps:
            if self.profile is not None:
                self.profile.reach(step + 1, self.folder, state, self.emit)
            batch = Batch.read(self.loader, step + self.saving.batch_offset, self.scope)
            state, metrics = step_function(state, batch)
            step += 1
            self.meter.add(step, metrics)
            self.interrupt.check(step)
            last = step == self.training.steps
            due = [] if last else [job for job in self.jobs if is_due(job, step)]
            fetch = due or last or self.interrupt.raised or step % self.training.log_every == 0
            spike = self._flush(state) if fetch else None
            if spike is not None:
                state = self.restoring.before_spike(spike)
                step = int(state.step)
                continue
            self._do(due, state)
            self.saving.report()
            if fetch and self.interrupt.raised and not last:  # a spike would be overlooked if nothing was fetched
                self._end_profile(state)
                self._stop(state)
        self._end_profile(state)
        if int(state.guard.skipped) == step:
            raise NotFiniteError(f"step {step}: every step was skipped")
        self._do(self.last_jobs, state, last=True)
        return state

    def _end_profile(self, state: TrainState) -> None:
        if self.profile is not None:
            self.profile.close(self.folder, state, self.emit)

    def _flush(self, state: TrainState) -> int | None:
        """Emits the metrics so far; returns the step of a spike to roll back.

        Where too many steps in a row have been skipped, the state before them is saved: unless its loss is not finite
        and there is an earlier checkpoint, from which going on is more promising.
        """
        try:
            return self.meter.flush()
        except NotFiniteError:
            updated = int(state.guard.skipped) < int(state.step)
            if updated and (self.meter.finite_loss or self.saving.saved_step is None):
                self.saving.run(state, last=False)
            raise

    def _do(self, jobs: list[Job], state: TrainState, last: bool = False) -> None:
        """Runs jobs, none of which counts as training time."""
        for job in jobs:
            job.run(state, last)
            if job is self.validation:
                self._validated(state, last)
        self.meter.restart()

    def _validated(self, state: TrainState, last: bool) -> None:
        """Keeps track of the best validation loss, and saves the step that has it if it is to be kept."""
        is_best = self.saving.evaluated(int(state.step), self.validation.compared)
        if is_best and self.training.keep_best:
            if not last:
                self.saving.run(state, last=False)
            self.saving.mark_best()

    def _stop(self, state: TrainState) -> NoReturn:
        """Ends an interrupted run, after saving its state unless that is done.

        Raises:
            Interrupted: always.
        """
        step, unsaved = int(state.step), None
        if step > 0:
            try:
                self.saving.run(state, last=True)
            except PolygptError as error:
                unsaved = str(error)
        raise Interrupted(step, self.folder, self.interrupt.number, unsaved)

    def _warn(self, text: str) -> None:
        self.emit(Note(text, warning=True))
