"""The demo: from text to a trained model on text that every machine has, compared with three baselines."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polygpt.evaluation import bigram_bits_per_byte, gzip_bits_per_byte, held_out_text, xz_bits_per_byte
from polygpt.recipes import load_recipe
from polygpt.training import Listener, RunResult, open_run, train
from polygpt.training.listeners import Baseline, write_report

# `--short`: every stage, in seconds rather than minutes; the figures are meaningless.
SHORT: dict[str, Any] = {
    "training.steps": 20,
    "training.eval_every": 10,
    "training.samples.every": 10,
    "training.samples.max_new_tokens": 16,
    "training.schedule.warmup_steps": 5,
    "model.num_layers": 2,
    "model.context_length": 64,
    "data.validation_fraction": 0.005,
}


@dataclass(frozen=True)
class DemoResult(RunResult):
    """A run's result, the baselines on the same held-out text, and the report's path."""

    bigram_bits_per_byte: float
    gzip_bits_per_byte: float
    xz_bits_per_byte: float
    report: str


def run_demo(
    out: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    short: bool = False,
    listeners: Iterable[Listener] = (),
) -> DemoResult:
    """Trains the recipe `demo` into `out` (by default the first free of runs/demo, runs/demo-2, ...).

    Raises:
        RequestError: `out` exists, or an override is wrong.
    """
    config = load_recipe("demo", {**(SHORT if short else {}), **(overrides or {})})
    out = out or _first_free(Path("runs/demo"))
    result = train(config, out, listeners=listeners)
    run = open_run(out)
    text = held_out_text(run.shards, run.tokenizer)
    measured = {
        "bigram_bits_per_byte": bigram_bits_per_byte(run.shards),
        "gzip_bits_per_byte": gzip_bits_per_byte(text),
        "xz_bits_per_byte": xz_bits_per_byte(text),
    }
    notes = {
        "bigram": "counts of token pairs in the training text, Witten-Bell smoothed",
        "gzip": "gzip -9 of the held-out text",
        "xz": "xz -9 of the held-out text",
    }
    baselines = [Baseline(name, measured[f"{name}_bits_per_byte"], note) for name, note in notes.items()]
    report = write_report(out, baselines)
    return DemoResult(**vars(result), **measured, report=str(report))


def _first_free(path: Path) -> Path:
    names = itertools.chain([path.name], (f"{path.name}-{number}" for number in itertools.count(2)))
    return next(free for name in names if not (free := path.with_name(name)).exists())
