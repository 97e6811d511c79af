"""What a run does beside training its model, in time: guards, events and saves, accumulation, and resuming.

    python benchmarks/saving.py [run] [guards] [accumulation] [resume] [--rounds 7]

The model, batch and optimizer are those of the recipe `demo`. What is compared takes turns in one process.

    run           rounds of 60 steps of `polygpt.train` with its listeners and one asynchronous save, beside a loop of
                  forward, backward, clipping and the optimizer alone
    guards        the same loop with guards and metrics
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
from typing import NamedTuple

import numpy as np

from polygpt.process import keep_freed_memory

ROUND, GROUP = 60, 20  # steps a round, and steps whose metrics are fetched together
SHORT = 4  # steps a round of `guards`
PARTS = 8
QUIET = {"training.eval_every": 0, "training.samples.every": 0, "training.log_every": GROUP}


class PausedRun:
    """`polygpt.train` in a thread, a round at a time; each round's save begins and ends within it."""

    def __init__(self, folder: str, save_every: int):
        from polygpt.recipes import load_recipe

        self.goes, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        changes = QUIET | {"training.save_every": save_every, "training.keep": 1, "training.steps": 10**6}
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


def plain_loop(folder: str, guarded: bool, steps: int) -> Callable[[], None]:
    """A round of `steps` on the run's batches, nothing but the step: without guards and metrics unless `guarded`."""
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
        for _ in range(steps):
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


class Taken(NamedTuple):
    """What a round took: seconds on the clock, and of both cores together."""

    wall: float
    cpu: float


def alternate(works: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[Taken]]:
    """What each round of each work took, after one round of each that does not count."""
    taken: dict[str, list[Taken]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter(), time.process_time()
            work()
            taken[name].append(Taken(time.perf_counter() - start[0], time.process_time() - start[1]))
    return {name: found[1:] for name, found in taken.items()}


def show(taken: dict[str, list[Taken]], steps: int) -> None:
    """Milliseconds a step, and the median ratio of a round to the first work's round beside it."""
    for kind in Taken._fields:
        first = next(iter(taken.values()))
        for name, found in taken.items():
            times = [getattr(one, kind) for one in found]
            ratios = [mine / getattr(its, kind) for mine, its in zip(times, first, strict=True)]
            milliseconds, ratio = 1e3 * statistics.median(times) / steps, statistics.median(ratios)
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
            print(f"{name}: {milliseconds:.2f} ms a step ({kind}), {ratio:.3f} ({spread})", flush=True)


def resume(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, kept = Path(folder) / "run", f"{folder}/cache"
        _until_a_step([*_polygpt("train", "demo", "--out", run), "training.log_every=1"], run, kept)
        words = [*_polygpt("train", "--resume", "--out", run), "training.log_every=1"]
        for name, cache in (("compiled programs kept", kept), ("nothing kept", "off")):
            times = [_until_a_step(words, run, cache) for _ in range(rounds)]
            median = statistics.median(times)
            print(
                f"resume to the first step, {name}: {median:.2f} s ({min(times):.2f} to {max(times):.2f})", flush=True
            )


def _polygpt(*words) -> list[str]:
    return [sys.executable, "-m", "polygpt", *map(str, words)]


def _until_a_step(words: list[str], run: Path, cache: str) -> float:
    """Seconds until the process has written another step; it is interrupted then, and saves."""
    metrics = run / "metrics.jsonl"

    def lines() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"POLYGPT_CACHE": cache}
    before, start = lines(), time.perf_counter()
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, env=environment)
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
    tasks = ("run", "guards", "accumulation", "resume")
    parser.add_argument("tasks", nargs="*", choices=[*tasks, []], default=[])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save-every", type=int, default=ROUND, help="steps between two saves of `run`; 0: none")
    arguments = parser.parse_args()
    arguments.tasks = arguments.tasks or list(tasks)
    keep_freed_memory()  # as the command does
    if "resume" in arguments.tasks:
        resume(arguments.rounds)
    if "accumulation" in arguments.tasks:
        works = {"8 plain steps": accumulated(1, PARTS), "one step of 8 parts": accumulated(PARTS, 1)}
        show(alternate(works, arguments.rounds), PARTS)
    if {"run", "guards"} & set(arguments.tasks):
        with tempfile.TemporaryDirectory() as folder:
            run = PausedRun(f"{folder}/run", arguments.save_every)
            if "guards" in arguments.tasks:  # in short turns: what they cost is little beside a machine's moods
                works = {
                    "the step alone": plain_loop(f"{folder}/run", guarded=False, steps=SHORT),
                    "with guards": plain_loop(f"{folder}/run", guarded=True, steps=SHORT),
                }
                show(alternate(works, arguments.rounds * ROUND // SHORT), SHORT)
            if "run" in arguments.tasks:
                works = {"the step alone": plain_loop(f"{folder}/run", guarded=False, steps=ROUND), "run": run}
                show(alternate(works, arguments.rounds), ROUND)
        os._exit(0)  # the run's thread waits for its next round


if __name__ == "__main__":
    main()
