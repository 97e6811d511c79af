"""The progress bar on standard error; plain lines if that is not a terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from polygpt.training.events import (
    Compiled,
    Ended,
    Evaluated,
    Event,
    Finished,
    Listener,
    Measured,
    Note,
    RolledBack,
    Sampled,
    Saved,
    Skipped,
    Spiked,
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
    """One line about an event, as rich markup; None if it is not worth one."""
    match event:
        case Note(text=text, warning=warning):
            return f"[yellow]warning:[/yellow] {escape(text)}" if warning else f"[dim]{escape(text)}[/dim]"
        case Started(step=step, num_parameters=count, facts=facts):
            where = f"going on after step {step}" if step else "training"
            return f"{where}: {count:,} parameters, " + escape(", ".join(f"{k} {v}" for k, v in facts.items()))
        case Compiled(seconds=seconds):
            return f"[dim]compiled in {seconds:.1f} s[/dim]"
        case Skipped(step=step, in_a_row=count):
            row = f", {count} in a row" if count > 1 else ""
            return f"[yellow]step {step}: skipped{row}[/yellow] ({event.reason})"
        case Spiked(step=step, loss=loss, mean=mean):
            return f"[yellow]step {step}: loss spike[/yellow] ({loss:.4f}, mean {mean:.4f})"
        case RolledBack(step=step, to_step=to_step, batches=batches):
            plural = "es" * (batches != 1)
            return f"[yellow]step {step}: back to step {to_step}[/yellow], leaving out {batches} batch{plural}"
        case Evaluated(step=step, val_loss=loss, val_bits_per_byte=bits, full=full):
            part = "" if full else " (part of the held-out text)"
            return f"step {step}: validation loss {loss:.4f}, {bits:.4f} bits per byte{part}"
        case Measured(step=step, metrics=metrics):
            known = (f"{escape(name)} {value:.4f}" for name, value in metrics.items() if value is not None)
            return f"step {step}: {', '.join(known)}"
        case Sampled(step=step, prompt=prompt, text=text):
            return f"step {step}: [cyan]{escape(_one_line(prompt))}[/cyan]{escape(_one_line(text))}"
        case Saved(step=step, folder=folder):
            return f"[dim]step {step}: saved {escape(str(folder))}[/dim]"
        case Finished(result=result):
            ended = "done" if result.warning is None else "[yellow]ended without learning anything[/yellow]"
            return f"{ended}: {result.steps} steps, {result.tokens_per_second:,.0f} tokens/s, {result.seconds:.0f} s"
    return None


def _one_line(text: str, width: int = 160) -> str:
    line = text.replace("\n", "⏎")
    return line if len(line) <= width else line[: width - 1] + "…"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 100 * length / 60:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


class _Progress:
    """What both forms share: every event worth a line is printed, and the last samples in full at the end."""

    def __init__(self, console: Console):
        self.console = console
        self.steps = self.first = 0
        self.begun = time.monotonic()
        self.last_samples: list[Sampled] = []

    def __call__(self, event: Event) -> None:
        match event:
            case Started(config=config, step=step):
                self.steps, self.first = config.training.steps, step
            case Compiled():
                self.begun = time.monotonic()  # compiling says nothing about the time left
            case Sampled(step=step) if step == self.steps:
                self.last_samples.append(event)
                return
            case Finished():
                for sample in self.last_samples:
                    self.console.print(f"\n[cyan]{escape(sample.prompt)}[/cyan]{escape(sample.text)}\n")
        if line := describe(event):
            self.console.print(line)

    def status(self, event: Stepped) -> str:
        """How fast training is, and how long it will still take at the pace so far, evaluations and all included."""
        left = (time.monotonic() - self.begun) / (event.step - self.first) * (self.steps - event.step)
        used = "" if event.flops_utilization is None else f" ({event.flops_utilization:.0%} of peak FLOPs)"
        return f"loss {event.loss:.4f}, {event.tokens_per_second:,.0f} tokens/s{used}, {_duration(left)} left"


class _Lines(_Progress):
    """Plain lines, with one every few seconds for the steps in between."""

    last = -PLAIN_INTERVAL

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        now = time.monotonic()
        if isinstance(event, Stepped) and event.tokens_per_second is not None and now - self.last >= PLAIN_INTERVAL:
            self.last = now
            self.console.print(f"step {event.step}/{self.steps}: {self.status(event)}")


class _Bar(_Progress):
    """A live bar below the lines, until the run ends; then it disappears, whether the run is complete or not.

    (It ends with the run rather than with this object: at interpreter exit, joining rich's drawing thread can hang.)
    """

    def __init__(self, console: Console):
        super().__init__(console)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns, console=console, transient=True)
        self.task = self.progress.add_task("compiling", total=None, status="", start=False)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Finished | Ended):
            self.progress.stop()
        super().__call__(event)
        match event:
            case Started(step=step):
                done = step == self.steps
                self.progress.update(self.task, description="evaluating" if done else "compiling")
                self.progress.start_task(self.task)
                self.progress.start()
            case Compiled():
                self._show(self.first, f"{self.first}/{self.steps}")
            case Stepped(step=step, tokens_per_second=speed) if speed is not None:
                self._show(step, f"{step}/{self.steps}, {self.status(event)}")

    def _show(self, step: int, status: str) -> None:
        self.progress.update(self.task, description="training", total=self.steps, completed=step, status=status)
