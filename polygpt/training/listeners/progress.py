"""The progress bar on standard error; plain lines where that is no terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from polygpt.training.events import (
    Ended,
    Evaluated,
    Event,
    Finished,
    Listener,
    Measured,
    Note,
    Sampled,
    Saved,
    Started,
    Stepped,
)

# Seconds between two plain lines.
PLAIN_INTERVAL = 5.0


def progress_listener(console: Console | None = None) -> Listener:
    """A bar on `console` (standard error by default) if it is a terminal, otherwise plain lines."""
    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    return _Bar(console) if console.is_terminal else _Lines(console)


def describe(event: Event) -> str | None:
    """One line for an event that is worth one, as rich markup."""
    match event:
        case Note(text=text, warning=warning):
            return f"[yellow]warning:[/yellow] {escape(text)}" if warning else f"[dim]{escape(text)}[/dim]"
        case Started(step=step, num_parameters=count, facts=facts):
            where = f"going on after step {step}" if step else "training"
            return f"{where}: {count:,} parameters, " + escape(", ".join(f"{k} {v}" for k, v in facts.items()))
        case Evaluated(step=step, val_loss=loss, val_bits_per_byte=bits, full=full):
            part = "" if full else " (part of the held-out text)"
            return f"step {step}: validation loss {loss:.4f}, {bits:.4f} bits per byte{part}"
        case Measured(step=step, metrics=metrics):
            known = (f"{escape(name)} {value:.4f}" for name, value in metrics.items() if value is not None)
            return f"step {step}: {', '.join(known)}"
        case Sampled(step=step, prompt=prompt, text=text):
            return f"step {step}: [cyan]{escape(_short(prompt))}[/cyan]{escape(_short(text))}"
        case Saved(step=step, folder=folder):
            return f"[dim]step {step}: saved {escape(str(folder))}[/dim]"
        case Finished(result=result):
            return f"done: {result.steps} steps, {result.tokens_per_second:,.0f} tokens/s, {result.seconds:.0f} s"
    return None


def _short(text: str, width: int = 160) -> str:
    line = text.replace("\n", "⏎")
    return line if len(line) <= width else line[: width - 1] + "…"


class _Lines:
    """A line for what matters, and one every few seconds for the steps between."""

    def __init__(self, console: Console):
        self.console, self.config, self.last = console, None, 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self.config, self.begun, self.first = event.config, time.monotonic(), event.step
        if isinstance(event, Stepped):
            self._step(event)
        elif line := describe(event):
            self.console.print(line)

    def _step(self, event: Stepped) -> None:
        now = time.monotonic()
        if event.tokens_per_second is None or now - self.last < PLAIN_INTERVAL:
            return
        self.last = now
        steps = self.config.training.steps
        left = (now - self.begun) / (event.step - self.first) * (steps - event.step)
        speed = f"{event.tokens_per_second:,.0f} tokens/s"
        self.console.print(f"step {event.step}/{steps}: loss {event.loss:.4f}, {speed}, {left:.0f} s left")


class _Bar:
    """A live bar below the lines, until the run ends.

    (Not until it is deleted: that can be when Python shuts down, where the thread that draws is waited for in vain.)
    """

    def __init__(self, console: Console):
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} · {task.fields[speed]} tokens/s ·"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stepped):
            speed = {} if event.tokens_per_second is None else {"speed": f"{event.tokens_per_second:,.0f}"}
            self.progress.update(self.task, completed=event.step, loss=f"{event.loss:.3f}", **speed)
            return
        if isinstance(event, Finished | Ended):
            self.progress.stop()
        if line := describe(event):
            self.console.print(line)
        if isinstance(event, Started):
            self.task = self.progress.add_task(
                "training", total=event.config.training.steps, completed=event.step, loss="–", speed="–"
            )
            self.progress.start()
