"""`report.html` and `loss.png`: a run at a glance, built from the files in its folder.

The page is self-contained: plots are inline SVG, and nothing is loaded.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polygpt.config import read_yaml, to_yaml
from polygpt.files import write_text
from polygpt.folders import CONFIG
from polygpt.model import model_of
from polygpt.training.events import Stepped
from polygpt.training.listeners.figures import (
    BLUE,
    GREY,
    ORANGE,
    RED,
    new_figure,
    panels,
    smooth,
    svg,
    template,
    write_png,
)
from polygpt.training.listeners.recorded import Recorded
from polygpt.training.run_folder import SAMPLES, read_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT, PLOT, BASELINES = "report.html", "loss.png", "baselines.json"
# Of every step, and of every group of steps.
COURSE = ("learning_rate", "grad_norm", "update_ratio", "loss_scale")
RESOURCES = ("tokens_per_second", "flops_utilization", "memory_bytes")


@dataclass(frozen=True)
class Baseline:
    """Another predictor or compressor of the same held-out text."""

    name: str
    bits_per_byte: float
    note: str = ""


def write_report(run: Path, baselines: Sequence[Baseline] = (), out: Path | None = None) -> Path:
    """Writes a run's page and its loss curve as PNG beside it, and returns the page's path.

    Args:
        run: the run's folder; the run may be unfinished.
        baselines: kept in the folder, so that later reports have them too.
        out: the page; None is `report.html` in the folder, with `loss.png`.

    Raises:
        RequestError: there is no run, or it has no metrics yet.
    """
    recorded = Recorded.read(run)
    page, plot = (run / REPORT, run / PLOT) if out is None else (out, out.with_suffix(".png"))
    if baselines:
        write_text(run / BASELINES, json.dumps([asdict(row) for row in baselines], indent=1) + "\n")
    elif (run / BASELINES).is_file():
        baselines = [Baseline(**row) for row in json.loads((run / BASELINES).read_text(encoding="utf-8"))]
    page.parent.mkdir(parents=True, exist_ok=True)
    curve = _loss_figure(recorded)
    write_png(curve, plot)
    write_text(page, template("report.html.jinja").render(curve=svg(curve), **_content(recorded, baselines)))
    return page


def _content(run: Recorded, baselines: Sequence[Baseline]) -> dict[str, Any]:
    """What the page says beside the loss curve."""
    lines, steps = run.lines, run.of("step")
    bits, measured = run.result["val_bits_per_byte"], _measured(lines)
    own = [Baseline("this model", bits)] if bits is not None else []
    course = [name for name in COURSE if any(line.get(name) is not None for line in steps)]
    resources = [name for name in RESOURCES if any(line.get(name) is not None for line in steps)]
    loads = [line for line in steps if "expert_load" in line]
    return {
        "name": run.name,
        "result": run.result,
        "finished": run.finished,
        "steps": run.config.training.steps,
        "config": to_yaml(read_yaml(run.folder / CONFIG)),
        "events": run.of("skipped", "spiked", "rolled_back"),
        "course": svg(panels(course, steps, _draw_steps)) if course else None,
        "resources": len(resources),
        "speed": svg(_resources_figure(resources, steps)) if resources else "",
        "parts": svg(panels(_extra_names(lines), steps, _draw_steps)) if _extra_names(lines) else None,
        "experts": svg(_experts_figure(loads)) if loads else None,
        "measured": measured,
        "measured_names": _measured_names(measured),
        "measures": svg(_measured_figure(measured)) if _measured_names(measured) else None,
        "caveat": model_of(run.config.model).training_caveat,
        "bars": svg(_baseline_figure([*own, *baselines])) if baselines else None,
        "baselines": baselines,
        "samples": read_lines(run.folder / SAMPLES),
        "evaluations": run.of("validation"),
        "versions": _versions(),
    }


def _of(lines: Sequence[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == event]


def _versions() -> dict[str, str]:
    packages = ("polygpt", "jax", "flax", "optax")
    return {"Python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def _loss_figure(run: Recorded) -> Figure:
    figure, axes = new_figure()
    steps, held_out = run.of("step"), run.of("validation")
    x, loss = [line["step"] for line in steps], [line["loss"] for line in steps]
    axes.plot(x, loss, color=BLUE, alpha=0.4, linewidth=0.8, label="training, each batch")
    axes.plot(x, smooth(loss), color=BLUE, linewidth=1.6, label="training, moving average")
    if run.abandoned:
        x, loss = [line["step"] for line in run.abandoned], [line["loss"] for line in run.abandoned]
        axes.plot(x, loss, color=GREY, linestyle="none", marker=".", markersize=3, label="rolled back")
    x, loss = [line["step"] for line in held_out], [line["val_loss"] for line in held_out]
    axes.plot(x, loss, color=ORANGE, marker="o", markersize=4, label="held-out text")
    looks = {"skipped": (GREY, ":"), "spiked": (RED, ":"), "rolled_back": (RED, "-")}
    for event, (color, style) in looks.items():
        for index, line in enumerate(run.of(event)):
            label = event.replace("_", " ") if index == 0 else None
            axes.axvline(line["step"], color=color, linestyle=style, linewidth=1.4, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    return figure


def _resources_figure(names: Sequence[str], steps: Sequence[dict[str, Any]]) -> Figure:
    """Speed, utilisation in percent and memory in GiB."""

    def draw(axes: Any, x: list[int], values: list[float]) -> None:
        axes.plot(x, values, color=BLUE, linewidth=1.2)
        axes.set_ylim(bottom=0)

    units = {"tokens_per_second": ("tokens/s", 1), "flops_utilization": ("% of peak", 100)}
    units["memory_bytes"] = ("memory (GiB)", 2**-30)
    rows = [
        {"step": line["step"]} | {units[n][0]: line[n] * units[n][1] for n in names if line.get(n) is not None}
        for line in steps
    ]
    return panels([units[name][0] for name in names], rows, draw)


def _experts_figure(steps: Sequence[dict[str, Any]]) -> Figure:
    """The experts' loads at the end, layers x experts, and the largest of each layer over time; 1 is an even load."""

    def relative(line: dict[str, Any]) -> list[np.ndarray]:
        return [np.asarray(shares) * len(shares) for shares in line["expert_load"].values()]

    layers, last = list(steps[-1]["expert_load"]), relative(steps[-1])
    table = np.full((len(last), max(map(len, last))), np.nan)  # layers may differ in their number of experts
    for row, load in zip(table, last, strict=True):
        row[: len(load)] = load
    largest = np.array([[load.max() for load in relative(line)] for line in steps]).T
    height = 0.22 * len(layers) + 1.1
    figure, all_axes = new_figure(2 * height, rows=2)
    limits = {"vmin": 0, "vmax": max(2.0, np.nanmax(table), largest.max())}
    ends = [line["step"] for line in steps]
    edges = [ends[0] - (ends[1] - ends[0]) if len(ends) > 1 else 0, *ends]
    for axes, values, x in zip(all_axes, (table, largest), (np.arange(table.shape[1] + 1) - 0.5, edges), strict=True):
        image = axes.pcolormesh(x, np.arange(len(layers) + 1) - 0.5, values, rasterized=True, **limits)
        axes.set_yticks(range(len(layers)), layers)
        axes.set_ylabel("layer")
        axes.invert_yaxis()
        axes.grid(visible=False)
    all_axes[0].xaxis.get_major_locator().set_params(integer=True)
    all_axes[0].set_xlabel(f"expert, after step {ends[-1]}")
    all_axes[1].set_xlabel("step: the most loaded expert")
    figure.colorbar(image, ax=all_axes, label="load (1 is even)")
    return figure


def _draw_steps(axes: Any, x: list[int], values: list[float]) -> None:
    axes.plot(x, values, color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(x, smooth(values), color=BLUE, linewidth=1.4)


# The fields of every step's line; others were reported by a part of the model.
_STEP_FIELDS = {"event", *(field.name for field in fields(Stepped))}


def _extra_names(lines: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in next(iter(_of(lines, "step")), {}) if name not in _STEP_FIELDS]


def _measured(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics of `training.evaluations`, those of one step in one row."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in _of(lines, "evaluation"):
        by_step.setdefault(line["step"], {}).update(line)
    return list(by_step.values())


def _measured_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    def draw(axes: Any, x: list[int], values: list[float]) -> None:
        axes.plot(x, values, color=ORANGE, marker="o", markersize=4)

    return panels(_measured_names(rows), rows, draw)


def _measured_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The metrics' names in order, without the standard errors."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name not in ("event", "step") and "_stderr" not in name]


def _baseline_figure(rows: Sequence[Baseline]) -> Figure:
    figure, axes = new_figure(0.5 * len(rows) + 0.9)
    names, values = [row.name for row in rows], [row.bits_per_byte for row in rows]
    bars = axes.barh(names, values, color=[BLUE] + [GREY] * (len(rows) - 1))
    axes.bar_label(bars, fmt="%.3f", padding=4)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlabel("bits per byte of the held-out text (lower is better)")
    return figure
