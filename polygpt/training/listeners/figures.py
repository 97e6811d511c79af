"""What figures of runs share: axes, moving averages, panels, and SVG that is the same for the same run."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polygpt.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, RED = "#2563eb", "#ea580c", "#94a3b8", "#dc2626"
# Okabe and Ito (2008), without yellow and black: distinguishable also to the colour-blind.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
STYLES = ("-", "--", ":", "-.")


def new_figure(height: float = 3.4, rows: int | None = None) -> tuple[Figure, Any]:
    """A figure and its axes; with `rows`, a list of axes below each other."""
    from matplotlib.figure import Figure  # takes a second to import: only a report should pay for it

    figure = Figure(figsize=(8, height), layout="constrained")
    all_axes = list(figure.subplots(rows or 1, squeeze=False)[:, 0])
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, all_axes[0] if rows is None else all_axes


def panels(names: Sequence[str], rows: Sequence[Mapping[str, Any]], draw: Callable[..., None]) -> Figure:
    """A panel for each of `names`, below each other, since their scales differ."""
    figure, all_axes = new_figure(1.8 * len(names), rows=len(names))
    for name, axes in zip(names, all_axes, strict=True):
        known = [row for row in rows if row.get(name) is not None]
        draw(axes, [row["step"] for row in known], [row[name] for row in known])
        axes.set_ylabel(name.replace("_", " "))
    all_axes[-1].set_xlabel("step")
    return figure


def smooth(values: Sequence[float], reach: int = 10) -> np.ndarray:
    """Moving average over `reach` values before and after each; near the start as many after as there are before.

    An average of the past alone lags behind a loss that falls quickly, as it does at the start.
    """
    index = np.arange(len(values))
    before = np.minimum(index, reach)
    after = np.minimum(before, index[::-1])
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[index + after + 1] - sums[index - before]) / (before + after + 1)


def svg(figure: Figure) -> str:
    """The figure as an SVG element."""
    from matplotlib import rc_context

    stream = io.StringIO()
    # Without a date and with fixed ids, a run always gives the same page.
    with rc_context({"svg.hashsalt": "polygpt"}):
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = stream.getvalue()
    return text[text.index("<svg") :]


def write_png(figure: Figure, path: Path) -> None:
    """Writes the figure, replacing an existing one atomically."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    write_bytes(path, stream.getvalue())


def template(name: str) -> Any:
    """A page's template."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def read(name: str) -> str:
        return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")

    return Environment(autoescape=True, undefined=StrictUndefined, loader=FunctionLoader(read)).get_template(name)
