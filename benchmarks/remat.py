"""Peak memory of a training step for each `training.remat`, from compiled programs that are not run.

    python benchmarks/remat.py [--layers 12 --width 768 --context 1024 --batch 4] [--plot remat.png]

Memory is XLA's own account of the compiled step: the state, which the new state takes over, and the temporaries. With
`--time` the steps are run as well, alternating, and the median time of each is given.
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


def trainer_of(args: argparse.Namespace, remat: str) -> Trainer:
    fields = {
        "vocab_size": 50304,
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

    figure = Figure(figsize=(7 if taken else 4, 3), layout="constrained")
    panels = [("peak memory, GB", memory), ("time of a step, s", taken)][: 2 if taken else 1]
    for axes, (title, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.bar(list(values), list(values.values()))
        axes.set_title(title)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("layers", 12), ("width", 768), ("context", 1024), ("batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--plot")
    args = parser.parse_args()
    steps = {remat: compiled(args, remat) for remat in POLICIES}
    analyses = {name: step.memory_analysis() for name, (_, step) in steps.items()}
    memory = {name: (m.argument_size_in_bytes + m.temp_size_in_bytes) / 1e9 for name, m in analyses.items()}
    taken = times(args, steps) if args.time else {}
    print("| remat | temporaries, GB | peak, GB | step, s |\n|---|---|---|---|")
    for name, m in analyses.items():
        seconds = f"{taken[name]:.2f}" if taken else "–"
        print(f"| {name} | {m.temp_size_in_bytes / 1e9:.2f} | {memory[name]:.2f} | {seconds} |")
    if args.plot:
        plot(args.plot, memory, taken)


if __name__ == "__main__":
    main()
