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
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from polygpt.model import model_of
from polygpt.sharding import Collective, Scope, bytes_by_axes, collectives, make_mesh, products
from polygpt.training import Batch, RunConfig, Trainer, TrainState

# The code is never run, so LLVM need not optimize it: 8 s instead of 26 for twelve layers of gpt2_xl on two cores.
_COMPILER = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
_PARTITIONED, _PASS = "*after_spmd-partitioning*.txt", "spmd-partitioning"


class Program(NamedTuple):
    """What one device holds, computes and sends in a step.

    Attributes:
        parameter_bytes: of the parameters.
        optimizer_bytes: of everything else that is kept between steps: the optimizer's state, averages, counters.
        batch_bytes: of the tokens.
        temporary_bytes: what the step needs besides, activations and gradients above all, by the buffers that XLA
            assigns for a CPU.
        flops: of matrix products, by the type of their operands.
        collective_bytes: of whole arrays on one device, by mesh axes and kind.
        sent_bytes: by mesh axes, as ring algorithms send them.
        compile_seconds: tracing included.
    """

    parameter_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    temporary_bytes: int
    flops: dict[str, int]
    collective_bytes: dict[str, dict[str, int]]
    sent_bytes: dict[str, float]
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
    devices = jax.devices()[: 1 if config.mesh is None else config.mesh.devices]
    trainer = Trainer(model_of(config.model), config.training, Scope.of(config.mesh, devices))
    state, batch = abstract_arguments(trainer, devices[0])
    lowered = trainer.lower_step(state, batch)
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile({**_COMPILER, "xla_dump_to": folder, "xla_dump_hlo_pass_re": _PASS})
        text = _partitioned(Path(folder))
    found = collectives(text, make_mesh(config.mesh, devices), scatters=True)
    flops: Counter[str] = Counter()
    for product in products(text):
        flops[product.dtype] += product.flops
    parameter_bytes = shard_bytes(state.params)
    return Program(
        parameter_bytes=parameter_bytes,
        optimizer_bytes=shard_bytes(state) - parameter_bytes,
        batch_bytes=shard_bytes(batch),
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        flops=dict(flops),
        collective_bytes=bytes_by_axes(found),
        sent_bytes=_sent(found),
        compile_seconds=time.perf_counter() - begun,
    )


def abstract_arguments(trainer: Trainer, device: jax.Device) -> tuple[TrainState, Batch]:
    """The arguments of a step as shapes with a placement: on the trainer's mesh or, without one, on `device`."""
    scope, alone = trainer.scope, SingleDeviceSharding(device)
    state = trainer.abstract_state()
    places = jax.tree.map(lambda _: alone, state) if scope is None else trainer.state_shardings
    shape = (trainer.config.batch_size, trainer.model.config.context_length)
    rows = alone if scope is None else scope.rows
    batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in (jnp.int32, jnp.int32, jnp.float32)))
    return jax.tree.map(_placed, state, places), batch


def _placed(leaf: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def shard_bytes(tree: PyTree) -> int:
    """What one device holds of arrays, or of shapes, with a placement."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _partitioned(folder: Path) -> str:
    """The program after partitioning or, on one device, before any pass of the compiler.

    There, unlike in the compiled text, dots are dots, and 16-bit numbers are not yet converted to float32, as the
    backend for CPUs does to compute and to send them.
    """
    files = sorted(folder.glob(_PARTITIONED)) or sorted(folder.glob("*before_optimizations.txt"))
    return files[-1].read_text(encoding="utf-8")


def _sent(found: list[Collective]) -> dict[str, float]:
    sent: Counter[str] = Counter()
    for each in found:
        sent["+".join(each.axes)] += each.sent
    return dict(sent)
