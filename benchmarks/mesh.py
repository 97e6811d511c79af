"""A training state on a mesh of simulated devices: bytes on each device, and how long the step takes to compile.

    python benchmarks/mesh.py [--out benchmarks/mesh.png] [--compile MODEL] [--rounds 3]

Bytes are those of parameters and AdamW's state, from the shapes of each device's shards (tests compare them with arrays
that are there). The ideal is 1/n of the whole on each of n devices. Compile times are of tracing and compiling on one
device and on eight, in turn, without JAX's cache, in CPU time; they say how the partitioner's work grows, not how long
a step runs.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
from jax.sharding import AbstractMesh

import polygpt
from polygpt.model import Model
from polygpt.sharding import MESH_AXES, MeshConfig, Scope, describe_mesh
from polygpt.training.config import TrainingConfig
from polygpt.training.state import Batch
from polygpt.training.step import Trainer

MODELS = ("tiny_moe", "gpt2_xl")
DEVICES = (1, 2, 4, 8)
MESHES = (
    MeshConfig(fsdp=8),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=8),
    MeshConfig(tensor=8),
    MeshConfig(data=2, expert=4),
)


def state_bytes(name: str, fsdp: int) -> int:
    """Bytes of parameters and optimizer state on the fullest device."""
    model = Model(polygpt.preset(name))
    training = TrainingConfig(steps=10, batch_size=8)
    trainer = Trainer(model, training, Scope(AbstractMesh((1, fsdp, 1, 1), MESH_AXES)))
    params = jax.tree.map(lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype), model.parameters)
    held = params, jax.eval_shape(trainer.optimizer.init, params)
    placed = trainer.shardings, trainer.state_shardings.optimizer
    sizes = jax.tree.map(lambda leaf, s: math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize, held, placed)
    return sum(jax.tree.leaves(sizes))


def compile_seconds(name: str, mesh: MeshConfig | None, **changes: object) -> float:
    """Seconds of CPU time to trace and compile the step; nothing is allocated but the batch."""
    config = polygpt.preset(name, **changes)
    config = config if config.vocab_size else config.with_vocab(8192)
    scope = Scope.of(mesh)
    trainer = Trainer(Model(config), TrainingConfig(steps=10, batch_size=8), scope)
    state, placed = trainer.abstract_state(), None if scope is None else trainer.state_shardings
    if placed is not None:
        state = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, placed)
    tokens = np.zeros((8, config.context_length), np.int32)
    mask = np.ones(tokens.shape, np.float32)
    batch = Batch.of({"input": tokens, "target": tokens, "mask": mask}, scope)
    jax.clear_caches()
    begun = time.process_time()
    trainer.compile_step(state, batch)
    return time.process_time() - begun


def plot(found: dict[str, list[int]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(9, 3.6), layout="constrained")
    for panel, (name, sizes) in zip(panels, found.items(), strict=True):
        panel.loglog(DEVICES, [sizes[0] / n / 1e9 for n in DEVICES], "--", color="0.6", label="ideal")
        panel.loglog(DEVICES, [size / 1e9 for size in sizes], "o-", label="on each device")
        panel.set(title=name, xlabel="devices (fsdp)", ylabel="parameters, AdamW's state, GB")
        panel.set_xticks(DEVICES, [str(n) for n in DEVICES], minor=False)
        panel.set_yticks([size / 1e9 for size in sizes], [f"{size / 1e9:.2f}" for size in sizes], minor=False)
        panel.minorticks_off()
        panel.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    parser.add_argument("--compile", metavar="MODEL", help="time the compilation of this preset's step instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--meshes", type=int, default=len(MESHES), help="only the first so many")
    arguments = parser.parse_args()
    if arguments.compile is None:
        found = {name: [state_bytes(name, count) for count in DEVICES] for name in MODELS}
        for name, sizes in found.items():
            for count, size in zip(DEVICES, sizes, strict=True):
                print(f"{name} fsdp {count}: {size:,} bytes, {size * count / sizes[0]:.3f} of the ideal")
        plot(found, arguments.out)
        return
    jax.config.update("jax_enable_compilation_cache", False)
    rounds: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for mesh in (None, *MESHES[: arguments.meshes]):
            seconds = compile_seconds(arguments.compile, mesh)
            name = "one device" if mesh is None else describe_mesh(mesh.shape)
            rounds.setdefault(name, []).append(seconds)
            print(f"{name}: {seconds:.2f} s", flush=True)
    alone = statistics.median(rounds["one device"])
    for name, seconds in rounds.items():
        print(f"{name}: {statistics.median(seconds):.2f} s, {statistics.median(seconds) / alone:.2f} of one device")


if __name__ == "__main__":
    main()
