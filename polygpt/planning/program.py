"""A training step compiled for a mesh of simulated devices: what each of them holds, computes and sends.

Nothing is allocated or run. Arrays are shapes with a placement, and devices are simulated by XLA's backend for CPUs,
which partitions a program as those for GPUs and TPUs do.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from polygpt.model import model_of
from polygpt.sharding import (
    Rules,
    batch_sharding,
    bytes_by_axes,
    collectives,
    make_mesh,
    placement,
    products,
    replicated_axes,
    use_mesh,
)
from polygpt.training import Batch, RunConfig, Trainer

# The code is never run, so LLVM need not optimize it: 8 s instead of 26 for twelve layers of gpt2_xl on two cores.
_COMPILER = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
_PASS = "spmd-partitioning"


class Program(NamedTuple):
    """What one device holds, computes and sends in a step.

    Attributes:
        parameter_bytes, optimizer_bytes: of the state between steps; counters and averages belong to the optimizer.
        gradient_bytes: of gradients as the optimizer takes them.
        batch_bytes: of the tokens.
        temporary_bytes: what the step needs besides state and batch, gradients included: XLA's own assignment of
            buffers, for CPUs.
        flops: of matrix products, by the type of their operands.
        collective_bytes: by mesh axes and kind, of whole arrays on one device.
        sent_bytes: the same as sent by ring algorithms.
        replicated: parameters that the mesh cannot split evenly.
        compile_seconds: tracing included.
    """

    parameter_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    batch_bytes: int
    temporary_bytes: int
    flops: dict[str, int]
    collective_bytes: dict[str, dict[str, int]]
    sent_bytes: dict[str, float]
    replicated: list[str]
    compile_seconds: float

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once: the new state takes the place of the old one."""
        return self.parameter_bytes + self.optimizer_bytes + self.batch_bytes + self.temporary_bytes


def compile_program(config: RunConfig) -> Program:
    """The training step of `config` on as many devices of this process as its mesh has.

    Raises:
        RequestError: there are fewer devices.
    """
    begun = time.perf_counter()
    count = 1 if config.mesh is None else config.mesh.devices
    mesh, rules = make_mesh(config.mesh, jax.devices()[:count]), Rules.of(config.mesh)
    model = model_of(config.model)
    trainer = Trainer(model, config.training)
    state = _placed_state(trainer, mesh, rules)
    rows = batch_sharding(mesh, rules)
    tokens = (config.training.batch_size, config.model.context_length)
    batch = Batch(
        *(jax.ShapeDtypeStruct(tokens, dtype, sharding=rows) for dtype in (jnp.int32, jnp.int32, jnp.float32))
    )
    with use_mesh(mesh, rules):
        lowered = jax.jit(trainer.step, donate_argnums=0).lower(state, batch)
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile({**_COMPILER, "xla_dump_to": folder, "xla_dump_hlo_pass_re": _PASS})
        partitioned = _partitioned(Path(folder)) or compiled.as_text()
    found = collectives(partitioned, mesh, scatters=True)
    flops: Counter[str] = Counter()
    for product in products(partitioned):
        flops[product.dtype] += product.flops
    sent: Counter[str] = Counter()
    for each in found:
        sent["+".join(each.axes)] += each.sent
    parameters = _shard_bytes(state.params)
    memory = compiled.memory_analysis()
    return Program(
        parameter_bytes=parameters,
        optimizer_bytes=_shard_bytes(state) - parameters,
        gradient_bytes=parameters,
        batch_bytes=_shard_bytes(batch),
        temporary_bytes=memory.temp_size_in_bytes,
        flops=dict(flops),
        collective_bytes=bytes_by_axes(found),
        sent_bytes=dict(sent),
        replicated=[
            f"{each.parameter}: {each.axis} {each.length:,} does not divide by {each.devices} ({'+'.join(each.mesh_axes)})"
            for each in replicated_axes(model.parameters, mesh, rules)
        ],
        compile_seconds=time.perf_counter() - begun,
    )


def _partitioned(folder: Path) -> str | None:
    """The program after partitioning; None on one device.

    There, unlike in the compiled text, dots are dots, and 16-bit numbers are not yet computed and sent in float32 as the
    backend for CPUs does.
    """
    files = sorted(folder.glob("*after_spmd-partitioning*.txt"))
    return files[-1].read_text(encoding="utf-8") if files else None


def _placed_state(trainer, mesh, rules):
    state = trainer.abstract_state()
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    flat = lambda t: {tuple(map(str, p)): l for p, l in jax.tree_util.tree_flatten_with_path(t)[0]}
    places, shapes = flat(placement(trainer.model.parameters, mesh, rules)), flat(state.params)

    def put(path, leaf):
        path = tuple(map(str, path))
        for i in range(len(path)):
            if path[i:] in places and shapes[path[i:]].shape == leaf.shape:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path[i:]])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

    return jax.tree_util.tree_map_with_path(put, state)


def _shard_bytes(tree: PyTree) -> int:
    """What one device holds of arrays with a placement."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
