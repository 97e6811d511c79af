"""How parts grow: time and memory with the context, decoding with the position, experts, compilation with depth.

    python benchmarks/growth.py [context] [decoding] [experts] [depth] [--rounds 7] [--json] [--plot growth.png]

What is compared runs in one process, in alternating rounds; medians count. Memory is what XLA reserves for the
temporaries of the compiled step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.config import merge, validate
from polygpt.model import Model, ModelConfig
from polygpt.process import keep_freed_memory
from polygpt.training import Batch, Trainer, TrainingConfig

sys.path.insert(0, str(Path(__file__).parent))

NARROW = {
    "vocab_size": 256,
    "context_length": 512,
    "embed_dim": 128,
    "num_layers": 2,
    "position": "rope",
    "norm": "rmsnorm",
    "attention": {"kind": "softmax", "num_heads": 4},
    "feedforward": {"kind": "glu", "mlp_dim": 256},
}
WINDOW = 128
KINDS = {
    "softmax": {"kind": "softmax", "num_heads": 4},
    "local": {"kind": "local", "num_heads": 4, "window": WINDOW},
    "linear": {"kind": "linear", "num_heads": 4},
}
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
DECODED = 64  # tokens whose time is taken together


def config(**changes: Any) -> ModelConfig:
    return validate(ModelConfig, merge(NARROW, changes))


class Step:
    """A compiled training step on random tokens, timed."""

    def __init__(self, model: ModelConfig, batch: int):
        length = model.context_length
        trainer = Trainer(Model(model), validate(TrainingConfig, {"steps": 1000, "batch_size": batch}))
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, batch, length)).astype(np.int32)
        self.batch = Batch(jnp.asarray(tokens[0]), jnp.asarray(tokens[1]), jnp.ones((batch, length)))
        self.state = trainer.init()
        before = time.perf_counter()
        self.compiled = trainer.compile_step(self.state, self.batch)
        self.compile_seconds = time.perf_counter() - before
        self.megabytes = self.compiled.memory_analysis().temp_size_in_bytes / 1e6

    def __call__(self) -> None:
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready(metrics.loss)


def medians(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, rounds alternating; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            before = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - before))
    return {name: median(values[1:]) for name, values in times.items()}


def exponent(x: list[float], y: list[float]) -> float:
    """The slope of log y over log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def context(rounds: int) -> dict:
    """Time and memory of a training step against the context, batch 1."""
    rows = []
    for length in LENGTHS:
        steps = {kind: Step(config(context_length=length, attention=part), 1) for kind, part in KINDS.items()}
        times = medians(steps, rounds)
        rows += [
            {"kind": kind, "context": length, "ms": times[kind], "megabytes": step.megabytes}
            for kind, step in steps.items()
        ]
        print(*(f"{row['kind']} {row['context']}: {row['ms']:.1f} ms" for row in rows[-3:]), sep=", ", file=sys.stderr)
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    fits = {
        kind: {name: exponent(list(LENGTHS), [row[name] for row in own]) for name in ("ms", "megabytes")}
        for kind, own in by_kind.items()
    }
    overtakes = {}
    for kind in ("local", "linear"):
        faster = [a["ms"] < b["ms"] for a, b in zip(by_kind[kind], by_kind["softmax"], strict=True)]
        # The shortest context from which on it is always the faster one.
        overtakes[kind] = next((n for i, n in enumerate(LENGTHS) if all(faster[i:])), None)
    return {"rows": rows, "exponents": fits, "overtakes_softmax_at": overtakes}


def decoding(rounds: int) -> dict:
    """Bytes of state and time a token at a position, batch 1."""
    wide = {"embed_dim": 384, "feedforward": {"mlp_dim": 1024}}
    parts = {
        "softmax 12/12": {"kind": "softmax", "num_heads": 12},
        "softmax 12/4": {"kind": "softmax", "num_heads": 12, "num_kv_heads": 4},
        "local": {"kind": "local", "num_heads": 12, "window": WINDOW},
        "linear": {"kind": "linear", "num_heads": 12},
    }
    rows = []
    for length in LENGTHS:
        models = {name: Model(config(context_length=length, attention=part, **wide)) for name, part in parts.items()}
        times = medians({name: _decoder(model, length) for name, model in models.items()}, rounds)
        rows += [
            {
                "kind": name,
                "position": length,
                "state_bytes": model.state_bytes(length),
                "ms_per_token": times[name] / DECODED,
            }
            for name, model in models.items()
        ]
    return {"rows": rows}


def _decoder(model: Model, length: int) -> Callable[[], None]:
    """Decodes the last tokens of a sequence of `length`, as a compiled loop with the state in its carry."""
    params = model.init(0)

    @jax.jit
    def run(params, state):
        def one(i, carry):
            token, state = carry
            position = jnp.full((1, 1), length - DECODED, jnp.int32) + i
            out = model.hidden(params, token, positions=position, state=state)
            return model.module(params).logits(out.hidden).argmax(-1).astype(jnp.int32), out.state

        return jax.lax.fori_loop(0, DECODED, one, (jnp.zeros((1, 1), jnp.int32), state))[0]

    state = jax.block_until_ready(jax.jit(lambda: model.init_state(1, length))())
    return lambda: jax.block_until_ready(run(params, state))


def experts(rounds: int) -> dict:
    """8 experts, 2 a token, beside a dense feed-forward of the same active FLOPs, and beside a loop over experts."""
    moe = {"kind": "moe", "mlp_dim": 512, "num_experts": 8, "top_k": 2}
    parts = {
        "dense": {"kind": "glu", "mlp_dim": 1024},
        "capacity": moe,
        "dropless": {**moe, "dispatch": "dropless"},
        "loop over experts": {**moe, "kind": "loop_experts:LoopConfig"},
    }
    steps = {name: Step(config(embed_dim=256, feedforward=part), 8) for name, part in parts.items()}
    times = medians(steps, rounds)
    return {
        "rows": [{"kind": name, "ms": ms, "over_dense": ms / times["dense"]} for name, ms in times.items()],
        "compile_seconds": {name: step.compile_seconds for name, step in steps.items()},
    }


def depth(rounds: int) -> dict:
    """Seconds to compile a training step of 4 and of 32 layers, scanned; nothing is read from a cache."""
    seconds: dict[int, list[float]] = {4: [], 32: []}
    for _ in range(rounds):
        for layers, taken in seconds.items():
            jax.clear_caches()
            taken.append(Step(config(num_layers=layers, scan_layers=True), 2).compile_seconds)
    halves = {layers: median(taken) for layers, taken in seconds.items()}
    return {"seconds": halves, "ratio": halves[32] / halves[4]}


def plot(result: dict, path: Path) -> None:
    """Time and memory against the context, state and time against the position; logarithmic."""
    from matplotlib.figure import Figure

    panels = [
        ("context", "ms", "one training step (ms)"),
        ("context", "megabytes", "temporary memory of a step (MB)"),
        ("position", "state_bytes", "decoding state (bytes)"),
        ("position", "ms_per_token", "decoding a token (ms)"),
    ]
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    for axes, (x, y, title) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        rows = result["context" if x == "context" else "decoding"]["rows"]
        for kind in dict.fromkeys(row["kind"] for row in rows):
            own = [row for row in rows if row["kind"] == kind]
            axes.loglog([row[x] for row in own], [row[y] for row in own], marker="o", markersize=4, label=kind)
        axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        axes.minorticks_off()
        axes.set_xlabel(x + " (tokens)")
        axes.set_title(title, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    studies = {"context": context, "decoding": decoding, "experts": experts, "depth": depth}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"{', '.join(studies)}; all by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, help="a PNG of what grows (context and decoding)")
    words = parser.parse_args()
    if unknown := set(words.studies) - set(studies):
        parser.error(f"no study {', '.join(sorted(unknown))}; choose from {', '.join(studies)}")
    if words.plot and words.studies and not {"context", "decoding"} <= set(words.studies):
        parser.error("--plot needs the studies context and decoding")
    keep_freed_memory()
    result = {name: studies[name](words.rounds) for name in words.studies or studies}
    if words.plot:
        plot(result, words.plot)
    if words.json:
        print(json.dumps(result))
        return
    for name, found in result.items():
        print(f"\n{name}")
        for row in found.pop("rows", []):
            print("  " + "  ".join(f"{v:>14.3f}" if isinstance(v, float) else f"{v:>14}" for v in row.values()))
        for key, value in found.items():
            print(f"  {key}: {json.dumps(value)}")


if __name__ == "__main__":
    main()
