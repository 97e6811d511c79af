"""`report.html` and `loss.png`: a finished run at a glance, built from the files in its folder.

The page is self-contained: plots are inline SVG, and nothing is loaded.
"""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polygpt.config import read_yaml, to_yaml
from polygpt.files import write_text
from polygpt.loading import CONFIG, RESULT
from polygpt.model import model_of
from polygpt.training.events import Stepped
from polygpt.training.run_folder import SAMPLES, read_config, read_lines, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT, PLOT = "report.html", "loss.png"
BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#94a3b8"


@dataclass(frozen=True)
class Baseline:
    """Another predictor or compressor of the same held-out text."""

    name: str
    bits_per_byte: float
    note: str = ""


def write_report(run: Path, baselines: Sequence[Baseline] = ()) -> Path:
    """Writes `report.html` and `loss.png` into a finished run's folder and returns the page's path."""
    lines = read_metrics(run)
    result = json.loads((run / RESULT).read_text(encoding="utf-8"))
    curve = _loss_figure(lines)
    curve.savefig(run / PLOT, dpi=150)
    bars = None
    if baselines:
        own = Baseline("this model", result["val_bits_per_byte"])
        bars = _svg(_baseline_figure([own, *baselines]))
    measured = _measured(lines)
    page = _template().render(
        name=run.name,
        result=result,
        config=to_yaml(read_yaml(run / CONFIG)),
        curve=_svg(curve),
        speed=_svg(_speed_figure(lines)),
        parts=_svg(_parts_figure(lines)) if _extra_names(lines) else None,
        measured=measured,
        measured_names=_measured_names(measured),
        measures=_svg(_measured_figure(measured)) if _measured_names(measured) else None,
        caveat=model_of(read_config(run).model).training_caveat,
        bars=bars,
        baselines=baselines,
        samples=read_lines(run / SAMPLES),
        evaluations=_of(lines, "validation"),
        versions=_versions(),
    )
    write_text(run / REPORT, page)
    return run / REPORT


def _of(lines: Sequence[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == event]


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    source = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(source)


def _versions() -> dict[str, str]:
    packages = ("polygpt", "jax", "flax", "optax")
    return {"Python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def _figure(height: float = 3.4, rows: int | None = None) -> tuple[Figure, Any]:
    """A figure and its axes; with `rows`, a list of axes below each other."""
    from matplotlib.figure import Figure  # takes a second to import: only a report should pay for it

    figure = Figure(figsize=(8, height), layout="constrained")
    all_axes = list(figure.subplots(rows or 1, squeeze=False)[:, 0])
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, all_axes[0] if rows is None else all_axes


def _loss_figure(lines: Sequence[dict[str, Any]]) -> Figure:
    figure, axes = _figure()
    steps = _of(lines, "step")
    x, loss = [line["step"] for line in steps], [line["loss"] for line in steps]
    axes.plot(x, loss, color=BLUE, alpha=0.4, linewidth=0.8, label="training, each batch")
    axes.plot(x, _smooth(loss), color=BLUE, linewidth=1.6, label="training, moving average")
    held_out = _of(lines, "validation")
    axes.plot(
        [line["step"] for line in held_out],
        [line["val_loss"] for line in held_out],
        color=ORANGE,
        marker="o",
        markersize=4,
        label="held-out text",
    )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    return figure


def _speed_figure(lines: Sequence[dict[str, Any]]) -> Figure:
    figure, axes = _figure(2.2)
    timed = [line for line in lines if "tokens_per_second" in line]
    axes.plot(
        [line["step"] for line in timed], [line["tokens_per_second"] for line in timed], color=BLUE, linewidth=1.2
    )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("tokens/s")
    return figure


# The fields of every step's line; others were reported by a part of the model.
_STEP_FIELDS = {"event", *(field.name for field in fields(Stepped))}


def _extra_names(lines: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in next(iter(_of(lines, "step")), {}) if name not in _STEP_FIELDS]


def _parts_figure(lines: Sequence[dict[str, Any]]) -> Figure:
    """Auxiliary losses and metrics of the model's parts, a panel each."""

    def draw(axes: Any, x: list[int], values: list[float]) -> None:
        axes.plot(x, values, color=BLUE, alpha=0.25, linewidth=0.8)
        axes.plot(x, _smooth(values), color=BLUE, linewidth=1.4)

    return _panels(_extra_names(lines), _of(lines, "step"), draw)


def _measured(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics of `training.evaluations`, those of one step in one row."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in _of(lines, "evaluation"):
        by_step.setdefault(line["step"], {}).update(line)
    return list(by_step.values())


def _measured_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    def draw(axes: Any, x: list[int], values: list[float]) -> None:
        axes.plot(x, values, color=ORANGE, marker="o", markersize=4)

    return _panels(_measured_names(rows), rows, draw)


def _measured_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The metrics' names in order, without the standard errors."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name not in ("event", "step") and "_stderr" not in name]


def _panels(names: Sequence[str], rows: Sequence[dict[str, Any]], draw: Callable[..., None]) -> Figure:
    """A panel for each of `names`, below each other, since their scales differ."""
    figure, all_axes = _figure(1.8 * len(names), rows=len(names))
    for name, axes in zip(names, all_axes, strict=True):
        known = [row for row in rows if row.get(name) is not None]
        draw(axes, [row["step"] for row in known], [row[name] for row in known])
        axes.set_ylabel(name.replace("_", " "))
    all_axes[-1].set_xlabel("step")
    return figure


def _baseline_figure(rows: Sequence[Baseline]) -> Figure:
    figure, axes = _figure(0.5 * len(rows) + 0.9)
    names, values = [row.name for row in rows], [row.bits_per_byte for row in rows]
    bars = axes.barh(names, values, color=[BLUE] + [GREY] * (len(rows) - 1))
    axes.bar_label(bars, fmt="%.3f", padding=4)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlabel("bits per byte of the held-out text (lower is better)")
    return figure


def _smooth(values: Sequence[float], reach: int = 10) -> np.ndarray:
    """Moving average over `reach` values before and after each; near the start as many after as there are before.

    An average of the past alone lags behind a loss that falls quickly, as it does at the start.
    """
    index = np.arange(len(values))
    before = np.minimum(index, reach)
    after = np.minimum(before, index[::-1])
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[index + after + 1] - sums[index - before]) / (before + after + 1)


def _svg(figure: Figure) -> str:
    from matplotlib import rc_context

    stream = io.StringIO()
    # Without a date and with fixed ids, a run always gives the same page.
    with rc_context({"svg.hashsalt": "polygpt"}):
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = stream.getvalue()
    return text[text.index("<svg") :]
