"""What a run does beside training its model, in time: guards, events and saves, accumulation, and resuming.

    python benchmarks/saving.py [step] [accumulation] [resume] [--rounds 5]

The model, batch and optimizer are those of the recipe `demo`. What is compared takes turns in one process.

    step          rounds of 60 steps of `polygpt.train` with its listeners and one asynchronous save, beside a loop of
                  forward, backward, clipping and the optimizer alone, and beside the same with guards and metrics
    accumulation  a step of 8 parts beside 8 steps of one part each
    resume        seconds from starting `polygpt train --resume` to the first step in its metrics.jsonl, with and
                  without compiled programs that earlier runs have kept
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from polygpt.process import keep_freed_memory

ROUND, GROUP = 60, 20  # steps a round, and steps whose metrics are fetched together
PARTS = 8
QUIET = {"training.eval_every": 0, "training.samples.every": 0, "training.log_every": GROUP}


class PausedRun:
    """`polygpt.train` in a thread, a round at a time; each round's save begins and ends within it."""

    def __init__(self, folder: str):
        from polygpt.recipes import load_recipe

        self.goes, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        changes = QUIET | {"training.save_every": ROUND, "training.keep": 1, "training.steps": 10**6}
        self.thread = threading.Thread(target=self._train, args=(load_recipe("demo", changes), folder), daemon=True)
        self.thread.start()
        self.paused.acquire()

    def _train(self, config, folder: str) -> None:
        from polygpt.training import train
        from polygpt.training.listeners import standard_listeners

        train(config, folder, listeners=[*standard_listeners(), self._listen])

    def _listen(self, event) -> None:
        from polygpt.training import Stepped

        if isinstance(event, Stepped) and event.step % ROUND == GROUP:
            self.paused.release()
            self.goes.acquire()

    def __call__(self) -> None:
        self.goes.release()
        self.paused.acquire()


def plain_loop(folder: str, guarded: bool) -> Callable[[], None]:
    """A round of steps on the same batches, nothing but the step: without guards and metrics unless `guarded`."""
    import jax
    import jax.numpy as jnp
    import optax

    from polygpt.model import model_of
    from polygpt.training import Batch, Trainer, open_run

    run = open_run(Path(folder))
    trainer, loader = Trainer(model_of(run.config.model), run.config.training), run.train_loader

    def bare(state, batch):
        gradients, metrics, _ = trainer.gradients(state, batch)
        factor = jnp.minimum(1.0, run.config.training.clip_norm / optax.tree.norm(gradients))
        gradients = jax.tree.map(lambda g: g * factor, gradients)
        updates, optimizer = trainer.optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(params=params, optimizer=optimizer, step=state.step + 1), metrics.loss

    step = jax.jit(trainer.step if guarded else bare, donate_argnums=0)
    state, done = trainer.init(), 0

    def advance() -> None:
        nonlocal state, done
        for _ in range(ROUND):
            state, metrics = step(state, Batch.of(loader.batch(done)))
            done += 1
        jax.block_until_ready((state, metrics))

    return advance


def accumulated(parts: int, count: int) -> Callable[[], None]:
    """`count` steps of `parts` parts of the demo's batch each."""
    import jax
    import jax.numpy as jnp

    from polygpt.model import model_of
    from polygpt.recipes import load_recipe
    from polygpt.training import Batch, Trainer

    own = load_recipe("demo").training.batch_size
    changes = {"training.batch_size": own * parts, "training.accumulation_steps": parts, "model.vocab_size": 4096}
    config = load_recipe("demo", changes)
    trainer = Trainer(model_of(config.model), config.training)
    ids = np.random.default_rng(0).integers(0, 4096, (2, own * parts, config.model.context_length), np.int32)
    batch = Batch(*map(jnp.asarray, ids), jnp.ones(ids.shape[1:]))
    state = trainer.init()
    step = trainer.compile_step(state, batch)

    def advance() -> None:
        nonlocal state
        for _ in range(count):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return advance


def alternate(works: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each work, after one round of each that does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
            print(name, times[name][-1], file=sys.stderr)
    return {name: found[1:] for name, found in times.items()}


def show(times: dict[str, list[float]], steps: int) -> None:
    """Milliseconds a step, and the median ratio of a round to the first work's round beside it."""
    first = next(iter(times.values()))
    for name, found in times.items():
        ratios = [ours / its for ours, its in zip(found, first, strict=True)]
        least, most = min(ratios), max(ratios)
        milliseconds = 1e3 * statistics.median(found) / steps
        print(
            f"{name}: {milliseconds:.2f} ms a step, {statistics.median(ratios):.3f} ({least:.3f} to {most:.3f})",
            flush=True,
        )


def resume(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, cold = Path(folder) / "run", {"POLYGPT_CACHE": "off"}
        _until_a_step([*_polygpt("train", "demo", "--out", run), "training.log_every=1"], run, {})
        for name, environment in (("compiled programs kept", {}), ("nothing kept", cold)):
            words = [*_polygpt("train", "--resume", "--out", run), "training.log_every=1"]
            times = [_until_a_step(words, run, environment) for _ in range(rounds + (not environment))]
            times = times[-rounds:]
            median = statistics.median(times)
            print(f"resume to the first step, {name}: {median:.2f} s ({min(times):.2f} to {max(times):.2f})")


def _polygpt(*words) -> list[str]:
    return [sys.executable, "-m", "polygpt", *map(str, words)]


def _until_a_step(words: list[str], run: Path, environment: dict[str, str]) -> float:
    """Seconds until the process has written another step; it is interrupted then, and saves."""
    metrics = run / "metrics.jsonl"

    def lines() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    before, start = lines(), time.perf_counter()
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, env=os.environ | environment)
    while lines() <= before:
        if process.poll() is not None:
            sys.exit(f"failed: {' '.join(words)}")
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    process.send_signal(signal.SIGINT)
    process.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = ("step", "accumulation", "resume")
    parser.add_argument("tasks", nargs="*", choices=[*tasks, []], default=list(tasks))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command does
    if "resume" in arguments.tasks:
        resume(arguments.rounds)
    if "accumulation" in arguments.tasks:
        works = {"8 plain steps": accumulated(1, PARTS), "one step of 8 parts": accumulated(PARTS, 1)}
        show(alternate(works, arguments.rounds), PARTS)
    if "step" in arguments.tasks:
        with tempfile.TemporaryDirectory() as folder:
            run = PausedRun(f"{folder}/run")
            works = {
                "the step alone": plain_loop(f"{folder}/run", guarded=False),
                "with guards and metrics": plain_loop(f"{folder}/run", guarded=True),
                "with events and a save every 60 steps, too": run,
            }
            show(alternate(works, arguments.rounds), ROUND)
        os._exit(0)  # the run's thread waits for its next round


if __name__ == "__main__":
    main()
