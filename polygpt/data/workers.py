"""Worker processes that prepare tasks, and what happens when one of them dies.

They are started as a command rather than with `multiprocessing`, which would run the caller's script again in each.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from polygpt.data.sources import Tally
from polygpt.data.tasks import Counts, Plan, describe, finished, run_task
from polygpt.errors import PolygptError, RequestError
from polygpt.tokenizers import Tokenizer

TRIES = 3


class Progress(NamedTuple):
    """How far a preparation is; `seconds` and `new_tokens` are of this process alone."""

    parts: int
    of_parts: int
    documents: int
    tokens: int
    new_tokens: int
    seconds: float


class _Worker:
    """A process and the task it has."""

    def __init__(self, work: Path, batch_chars: int, alone: bool):
        package = str(Path(__file__).parents[2])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys([package, *filter(None, sys.path)]))}
        if not alone:
            environment["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process of its own
        # -P: a file in the current folder cannot take the place of a module.
        command = [sys.executable, "-P", "-m", "polygpt.data.worker", str(work), str(batch_chars)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)
        self.task: int | None = None

    def ask(self, task: int) -> None:
        """Gives it a task; if it has died, `answer` says so."""
        self.task = task
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{task}\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any] | None:
        """Its answer, for which this waits; None if it has died."""
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        with suppress(BrokenPipeError):
            self.process.stdin.close()


class Pool:
    """The tasks of a plan, run by this process or by workers; those that were finished before are kept.

    Attributes:
        counts: of each finished task, by number.
    """

    def __init__(
        self,
        work: Path,
        made: Plan,
        tokenizer: Tokenizer,
        note: Callable[[str], None],
        progress: Callable[[Progress], None],
    ):
        self.work, self.made, self.tokenizer, self.progress = work, made, tokenizer, progress
        found = {index: finished(work, index, made) for index in range(len(made.tasks))}
        self.counts = {index: counts for index, counts in found.items() if counts is not None}
        self.todo = [index for index in found if index not in self.counts]
        self.kept_tokens = self._total("tokens")
        self.start = time.monotonic()
        self.errors: dict[int, PolygptError] = {}
        if self.counts:
            note(f"data: {len(self.counts)} of {len(found)} parts kept from {work}")

    def run(self, workers: int, engine: str = "local") -> None:
        """Runs what is left to do.

        Raises:
            RequestError: a part cannot be read or encoded: the first of them, whatever the order.
            PolygptError: a worker cannot write, or each that had a certain part died.
        """
        if engine == "ray":
            from polygpt.data import cluster  # needs a package that few have

            if self.todo:
                cluster.distribute(self, workers)
        elif workers == 1:
            while (task := self.next()) is not None:
                self._done(task, run_task(self.work, task, self.made, self.tokenizer))
        elif self.todo:
            self._distribute(min(workers, len(self.todo)))
        if self.errors:
            raise self.errors[min(self.errors)]

    def _distribute(self, workers: int) -> None:
        deaths: dict[int, int] = {}
        with selectors.DefaultSelector() as selector, _closing() as running:

            def start(task: int) -> None:
                worker = _Worker(self.work, self.made.config.batch_chars, alone=workers == 1)
                running.append(worker)
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
                worker.ask(task)

            def stop(worker: _Worker) -> None:
                selector.unregister(worker.process.stdout)
                running.remove(worker)
                worker.close()

            for _ in range(workers):
                start(self.next())
            while running:
                for key, _ in selector.select():
                    worker: _Worker = key.data
                    task, answer = worker.task, worker.answer()
                    if answer is None:
                        stop(worker)
                        deaths[task] = deaths.get(task, 0) + 1
                        if deaths[task] < TRIES:
                            start(task)
                            continue
                        code = worker.process.returncode
                        self.errors[task] = PolygptError(
                            f"{describe(self.made.tasks[task].part)}: the process that prepares it died {TRIES} times "
                            f"({f'signal {-code}' if code < 0 else f'exit code {code}'}); it may need more memory"
                        )
                        continue
                    self.take(task, answer)
                    following = self.next()
                    if following is None:
                        stop(worker)
                    else:
                        worker.ask(following)

    def take(self, task: int, answer: dict[str, Any]) -> None:
        """Records the answer of the worker that ran a task."""
        if "error" in answer:
            kind = RequestError if answer["kind"] == "RequestError" else PolygptError
            self.errors[task] = kind(answer["error"])
        else:
            self._done(task, Counts(**answer["counts"]))

    def next(self) -> int | None:
        """The next task; None if there is none, or a failure before it makes it useless."""
        if not self.todo or self.errors or not self._is_wanted(self.todo[0]):
            return None
        return self.todo.pop(0)

    def _is_wanted(self, task: int) -> bool:
        """Whether no file before the task's is refused for what is not UTF-8 in it."""
        if self.made.config.invalid_utf8 != "refuse":
            return True
        tasks = self.made.tasks
        invalid = [index for index, counts in self.counts.items() if counts.tally["invalid"]]
        return not invalid or tasks[task].part.file == tasks[min(invalid)].part.file

    def _done(self, task: int, counts: Counts) -> None:
        self.counts[task] = counts
        new = (tokens := self._total("tokens")) - self.kept_tokens
        seconds = time.monotonic() - self.start
        parts = len(self.made.tasks)
        self.progress(Progress(len(self.counts), parts, self._total("documents"), tokens, new, seconds))

    def _total(self, name: str) -> int:
        return sum(sum(getattr(counts, name).values()) for counts in self.counts.values())

    def tallies(self) -> Iterator[tuple[str, Tally]]:
        """The tally of each file that was read, in order."""
        files: dict[str, Tally] = {}
        for index in sorted(self.counts):
            tally = files.setdefault(self.made.tasks[index].part.file, Tally())
            tally.add(Tally(**self.counts[index].tally))
        yield from files.items()


@contextmanager
def _closing() -> Iterator[list[_Worker]]:
    running: list[_Worker] = []
    try:
        yield running
    finally:
        for worker in running:
            worker.close()
