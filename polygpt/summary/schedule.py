"""A run's learning rate over its steps, as points and as a picture (SVG)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from polygpt.training import TrainingConfig

POINTS = 120

_SVG = """\
<svg viewBox="-70 -20 740 240" width="740" style="max-width: 100%" role="img" aria-label="learning rate by step">
<g fill="none" stroke="currentColor"><path d="M0 0V180H640" opacity="0.4"/>
<polyline points="{line}" stroke-width="2"/></g>
<g fill="currentColor" font-family="sans-serif" font-size="13">
<text x="-8" y="5" text-anchor="end">{peak:.3g}</text><text x="-8" y="185" text-anchor="end">0</text>
<text x="0" y="202">step {first:,}</text><text x="640" y="202" text-anchor="end">{last:,}</text></g>
</svg>"""


def schedule_points(training: TrainingConfig) -> dict[str, Any]:
    """The learning rate at up to `POINTS` evenly spaced steps, the first and the last included; ready for JSON."""
    schedule = training.schedule.build(training.optimizer.learning_rate, training.steps)
    steps = np.unique(np.linspace(0, training.steps - 1, POINTS).round().astype(int))
    # One program, and one shape whatever the number of steps: compiled once, and then cached.
    padded = jnp.asarray(np.resize(steps, POINTS), jnp.int32)
    rates = np.asarray(jax.jit(jax.vmap(schedule))(padded), np.float64)[: len(steps)]
    rounded = [float(f"{rate:.6g}") for rate in rates]
    return {"kind": training.schedule.kind, "steps": steps.tolist(), "learning_rate": rounded}


def schedule_svg(points: dict[str, Any]) -> str:
    """The learning rate of `schedule_points` drawn over the steps, from 0 to its largest value."""
    steps, rates = points["steps"], points["learning_rate"]
    span, peak = max(steps[-1] - steps[0], 1), max(rates)
    line = " ".join(
        f"{640 * (step - steps[0]) / span:.1f},{180 * (1 - rate / peak):.1f}"
        for step, rate in zip(steps, rates, strict=True)
    )
    return _SVG.format(line=line, peak=peak, first=steps[0], last=steps[-1])
