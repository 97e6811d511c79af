"""Several runs in one page: their curves over each other, their figures, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from polygpt.errors import RequestError
from polygpt.files import write_text
from polygpt.training.listeners.figures import COLORS, STYLES, new_figure, smooth, svg, template, write_png
from polygpt.training.listeners.recorded import Recorded

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Comparison(NamedTuple):
    """What was compared and where the page is.

    Attributes:
        runs: for each its name, whether it has finished, its figures, and its values of the settings that differ.
        page, plot: the HTML page and its curves as PNG.
        x: what the curves are drawn over, `steps` or `tokens`.
    """

    runs: list[dict[str, Any]]
    page: str
    plot: str
    x: str


def compare_runs(folders: Sequence[Path], out: Path, x: str | None = None) -> Comparison:
    """Writes a page that overlays the curves of runs, and its curves beside it as PNG.

    Args:
        folders: of the runs, at least two.
        out: the page.
        x: `steps` or `tokens`; None is tokens where the runs' steps see different numbers of them.

    Raises:
        RequestError: a folder is no run, has no metrics, or is given twice.
    """
    check_distinct(folders)
    runs = [Recorded.read(folder) for folder in folders]
    x = x or ("steps" if len({run.tokens_per_step for run in runs}) == 1 else "tokens")
    titles = [run.name for run in runs]
    if len(set(titles)) < len(titles):
        titles = [str(folder) for folder in folders]
    loss, speed = _curves(runs, titles, x), _speeds(runs, titles, x)
    plot = out.with_suffix(".png")
    figures = ("steps", "train_loss", "val_loss", "val_bits_per_byte", "tokens_per_second", "seconds")
    rows = [
        {"name": title, "run": str(folder), "finished": run.finished, "of_steps": run.config.training.steps}
        | {name: run.result.get(name) for name in figures}
        for title, folder, run in zip(titles, folders, runs, strict=True)
    ]
    for row, settings in zip(rows, differing([run.config.to_dict() for run in runs]), strict=True):
        row["settings"] = settings
    page = template("comparison.html.jinja").render(
        rows=rows, settings=list(rows[0]["settings"]), colors=COLORS, loss=svg(loss), speed=svg(speed), x=x
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    write_png(loss, plot)
    return Comparison(rows, str(out), str(plot), x)


def check_distinct(folders: Sequence[Path]) -> None:
    """Refuses a run that is given twice.

    Raises:
        RequestError: names it.
    """
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise RequestError(f"{folder}: given twice; name each run once")
        seen.add(folder.resolve())


def differing(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each configuration its values of the settings in which not all agree, by dotted key; None is "not set"."""
    flat = [dict(_flat(config)) for config in configs]
    keys = dict.fromkeys(key for values in flat for key in values)
    found = [key for key in keys if any(values.get(key) != flat[0].get(key) for values in flat)]
    return [{key: values.get(key) for key in found} for values in flat]


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def _curves(runs: Sequence[Recorded], titles: Sequence[str], x: str) -> Figure:
    """Training loss (each batch faint, the moving average solid) above the loss on held-out text."""
    figure, (training, held_out) = new_figure(6.4, rows=2)
    for index, (run, title) in enumerate(zip(runs, titles, strict=True)):
        scale, look = run.tokens_per_step if x == "tokens" else 1, _look(index)
        steps, validation = run.of("step"), run.of("validation")
        at, losses = [line["step"] * scale for line in steps], [line["loss"] for line in steps]
        training.plot(at, losses, color=look["color"], alpha=0.2, linewidth=0.6)
        training.plot(at, smooth(losses), label=title, linewidth=1.6, **look)
        at = [line["step"] * scale for line in validation]
        held_out.plot(at, [line["val_loss"] for line in validation], label=title, marker="o", markersize=4, **look)
    training.set_ylabel("training loss (nats per token)")
    held_out.set_ylabel("held-out loss (nats per token)")
    held_out.set_xlabel(x)
    held_out.sharex(training)
    training.legend(frameon=False)
    return figure


def _speeds(runs: Sequence[Recorded], titles: Sequence[str], x: str) -> Figure:
    figure, axes = new_figure(2.2)
    for index, (run, title) in enumerate(zip(runs, titles, strict=True)):
        scale = run.tokens_per_step if x == "tokens" else 1
        timed = [line for line in run.of("step") if "tokens_per_second" in line]
        axes.plot(
            [line["step"] * scale for line in timed],
            [line["tokens_per_second"] for line in timed],
            label=title,
            **_look(index),
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel("tokens/s")
    return figure


def _look(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "linestyle": STYLES[index // len(COLORS) % len(STYLES)]}
