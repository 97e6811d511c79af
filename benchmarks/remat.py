"""Peak memory of a training step for each `training.remat`, from compiled programs that are not run.

    python benchmarks/remat.py [--layers 12 --width 768 --context 1024 --batch 16] [--time] [--plot remat.png]

Memory is XLA's own account of the compiled step: the state, which the new state takes over, and the temporaries. With
`--time` the steps of a smaller model (TIMED) are run as well, alternating, and the median of each is given.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from polygpt.config import validate
from polygpt.model import Model, ModelConfig
from polygpt.training import Batch, Trainer, TrainingConfig

POLICIES = ("none", "dots", "block", "full")
TIMED = {"layers": 8, "width": 256, "context": 256, "batch": 4, "vocab": 2048}


def trainer_of(args: argparse.Namespace, remat: str) -> Trainer:
    fields = {
        "vocab_size": args.vocab,
        "context_length": args.context,
        "embed_dim": args.width,
        "num_layers": args.layers,
        "position": "learned",
        "norm": "layernorm",
        "attention": {"kind": "softmax", "num_heads": args.width // 64},
        "feedforward": {"kind": "mlp", "mlp_dim": 4 * args.width},
        "scan_layers": True,
    }
    training = {"steps": 100, "batch_size": args.batch, "remat": remat}
    return Trainer(Model(validate(ModelConfig, fields)), validate(TrainingConfig, training))


def compiled(args: argparse.Namespace, remat: str) -> tuple[Trainer, Any]:
    trainer = trainer_of(args, remat)
    ids = jax.ShapeDtypeStruct((args.batch, args.context), jnp.int32)
    batch = Batch(ids, ids, jax.ShapeDtypeStruct(ids.shape, jnp.float32))
    return trainer, jax.jit(trainer.step, donate_argnums=0).lower(trainer.abstract_state(), batch).compile()


def times(args: argparse.Namespace, steps: dict[str, tuple[Trainer, Any]], rounds: int = 5) -> dict[str, float]:
    """Median seconds of a step, the policies alternating."""
    ids = jnp.zeros((args.batch, args.context), jnp.int32)
    batch, seconds = Batch(ids, ids, jnp.ones(ids.shape)), {name: [] for name in steps}
    states = {name: trainer.init() for name, (trainer, _) in steps.items()}
    for _ in range(rounds + 1):
        for name, (_, step) in steps.items():
            start = time.perf_counter()
            states[name], _ = jax.block_until_ready(step(states[name], batch))
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def plot(path: str, memory: dict[str, float], taken: dict[str, float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 if taken else 4, 3), layout="constrained")
    panels = [("peak memory of a step (GB)", memory, "%.1f")]
    if taken:
        relative = {name: seconds / taken["none"] for name, seconds in taken.items()}
        panels.append(("time of a step, smaller model (none = 1)", relative, "%.2f"))
    for axes, (title, values, form) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        bars = axes.bar(list(values), list(values.values()), color="#2563eb", width=0.6)
        axes.bar_label(bars, fmt=form, padding=2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.12)
        axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("layers", 12), ("width", 768), ("context", 1024), ("batch", 16), ("vocab", 50304)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--plot")
    args = parser.parse_args()
    small = argparse.Namespace(**TIMED)
    taken = times(small, {remat: compiled(small, remat) for remat in POLICIES}) if args.time else {}
    memory = {}
    print("| remat | temporaries, GB | peak, GB | step of the smaller model, ms |\n|---|---|---|---|", flush=True)
    for remat in POLICIES:
        analysis = compiled(args, remat)[1].memory_analysis()
        memory[remat] = (analysis.argument_size_in_bytes + analysis.temp_size_in_bytes) / 1e9
        milliseconds = f"{1e3 * taken[remat]:.0f}" if taken else "–"
        temporaries = f"{analysis.temp_size_in_bytes / 1e9:.2f}"
        print(f"| {remat} | {temporaries} | {memory[remat]:.2f} | {milliseconds} |", flush=True)
    if args.plot:
        plot(args.plot, memory, taken)


if __name__ == "__main__":
    main()
