"""The devices and libraries of this machine or cluster, and whether they compute correctly: `polygpt doctor`."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from polygpt.distributed import exchange, process_count
from polygpt.kernels import (
    AttentionSpec,
    ScoreInputs,
    ScoreRule,
    attention,
    choose_attention,
    native_unavailable,
    reference_attention,
)
from polygpt.process import machine_memory
from polygpt.sharding import MeshConfig, make_mesh
from polygpt.training import listed

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Those of accelerators, of which a machine has one at most.
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin", "libtpu")

# Largest difference from the reference, of outputs and gradients, as a share of the largest value of the reference.
# Rounding to bfloat16 is 0.4 %, and float32 products in TF32 or bfloat16 (GPUs, TPUs) are off by 0.1 to 1 %; a wrong
# mask or a lost scale is off by 10 % and more.
TOLERANCE = {"float32": 0.02, "bfloat16": 0.04}
EXACT_TOLERANCE = 1e-4  # of float32 on a CPU

LENGTH, HEADS, KV_HEADS, HEAD_DIM = 256, 4, 2, 64
_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bfloat16": ("bfloat16", {}),
    "float32": ("float32", {}),
    "bfloat16, window of 64": ("bfloat16", {"window": 64}),
    "bfloat16, packed documents": ("bfloat16", {"packed": True}),
}


class AttentionCheck(NamedTuple):
    """One kernel beside the reference.

    Attributes:
        case: what it computed.
        kernel: which one `implementation=auto` takes.
        error, gradient_error: largest difference, as a share of the reference's largest value.
        agrees: whether both are within the tolerance.
    """

    case: str
    kernel: str
    error: float
    gradient_error: float
    agrees: bool


class AllReduceCheck(NamedTuple):
    """A sum over all devices, of every process.

    Attributes:
        devices, processes: how many took part.
        bytes: of the array on each device.
        seconds: of the fastest of a few runs.
        correct: whether the devices of this process hold the right sum.
    """

    devices: int
    processes: int
    bytes: int
    seconds: float
    correct: bool


def diagnose(progress: Callable[[str], None] = lambda step: None) -> dict[str, Any]:
    """Everything that `polygpt doctor` reports, ready for JSON; `problems` lists what is wrong, in any process.

    Of several processes, all must call this.

    Args:
        progress: progress callback, called with what is looked at next.
    """
    progress("devices")
    facts = {
        "polygpt": _version("polygpt"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "libraries": {name: found for name in (*LIBRARIES, *PLUGINS) if (found := _version(name))},
        "backend": jax.default_backend(),
        "processes": jax.process_count(),
        "process": jax.process_index(),
        "devices": _devices(),
        "memory": {"machine_bytes": machine_memory(), "cpu_cores": _cores()},
        "interconnect": _interconnect(),
        "native": _native(),
    }
    checks = []
    for case in _CASES:
        progress(f"attention: {case}")
        checks.append(check_attention(case))
    progress("all-reduce")
    reduced = check_all_reduce()
    problems = []
    for index, found in enumerate(exchange("problems", _problems(facts["backend"], checks, reduced))):
        problems += [f"process {index}: {problem}" if process_count() > 1 else problem for problem in found]
    return {
        **facts,
        "attention": [each._asdict() for each in checks],
        "all_reduce": reduced._asdict(),
        "problems": problems,
    }


def _native() -> str | None:
    """How decoding on a CPU is computed; None with an accelerator."""
    if jax.default_backend() != "cpu":
        return None
    return f"by XLA, half as fast: {why}" if (why := native_unavailable()) else "in C++, compiled for this processor"


def check_attention(case: str) -> AttentionCheck:
    """Runs the kernel that `implementation=auto` takes on this machine, and the reference in float32."""
    dtype, asked = _CASES[case]
    rule = ScoreRule(HEAD_DIM**-0.5, asked.get("window"))
    segment_ids = jnp.repeat(jnp.arange(4), LENGTH // 4)[None] if asked.get("packed") else None
    inputs = ScoreInputs(segment_ids=segment_ids)
    spec = AttentionSpec.of(rule, jnp.dtype(dtype), LENGTH, HEAD_DIM, segment_ids=segment_ids is not None)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(1, LENGTH, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    *arrays, direction = (jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True))
    positions = jnp.arange(LENGTH)[None]

    def reference(q: Array, k: Array, v: Array) -> Array:
        return reference_attention(q, k, v, rule, inputs, positions, positions)

    found = _with_gradients(lambda q, k, v: attention(q, k, v, rule, inputs), arrays, direction)
    with jax.default_matmul_precision("highest"):
        right = _with_gradients(reference, [x.astype(jnp.float32) for x in arrays], direction.astype(jnp.float32))
    error, *gradients = map(_difference, found, right)
    exact = dtype == "float32" and jax.default_backend() == "cpu"
    worst = max(error, *gradients)
    agrees = worst <= (EXACT_TOLERANCE if exact else TOLERANCE[dtype])  # False for NaN
    return AttentionCheck(case, choose_attention("auto", spec), error, max(gradients), agrees)


def _with_gradients(function: Callable[..., Array], arrays: list[Array], direction: Array) -> list[Array]:
    """The output, and the gradients of its product with `direction`."""

    @jax.jit
    def both(*arrays: Array) -> tuple[Array, ...]:
        out, pull = jax.vjp(function, *arrays)
        return out, *pull(direction.astype(out.dtype))

    return list(both(*arrays))


def _difference(found: Array, right: Array) -> float:
    found, right = np.asarray(found, np.float32), np.asarray(right, np.float32)
    return float(np.abs(found - right).max() / np.abs(right).max())


def check_all_reduce() -> AllReduceCheck:
    """Sums an array over all devices; in a cluster, every process must call this."""
    devices = jax.devices()
    mesh = make_mesh(MeshConfig(data=len(devices)), devices)
    length = 2**18 if jax.default_backend() == "cpu" else 2**24
    shards = NamedSharding(mesh, PartitionSpec("data"))

    @functools.partial(jax.jit, out_shardings=shards)
    def start() -> Array:  # device i holds i + 1 everywhere
        return jnp.broadcast_to(jnp.arange(1.0, 1 + len(devices))[:, None], (len(devices), length))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    def total(x: Array) -> Array:
        return jax.lax.psum(x, "data") + jnp.zeros_like(x)

    held = start()
    sums = total(held)
    right = len(devices) * (len(devices) + 1) / 2
    correct = all((np.asarray(shard.data) == right).all() for shard in sums.addressable_shards)
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        jax.block_until_ready(total(held))
        seconds.append(time.perf_counter() - begun)
    return AllReduceCheck(len(devices), jax.process_count(), 4 * length, min(seconds), correct)


def _problems(backend: str, checks: list[AttentionCheck], reduced: AllReduceCheck) -> list[str]:
    problems = [
        f"attention ({each.case}): the kernel '{each.kernel}' is off by {max(each.error, each.gradient_error):.2g} of "
        "the largest value; train with model.attention.implementation=xla"
        for each in checks
        if not each.agrees
    ]
    if not reduced.correct:
        problems.append(f"all-reduce: the sum over {reduced.devices} devices is wrong; the interconnect is at fault")
    if backend == "cpu" and shutil.which("nvidia-smi") and os.environ.get("JAX_PLATFORMS") != "cpu":
        problems.append("there is an NVIDIA GPU, but JAX does not use it; install polygpt[gpu]")
    return problems


def _devices() -> list[dict[str, Any]]:
    """The devices of all processes by kind; their memory as far as this process can see it."""
    counts = Counter(device.device_kind for device in jax.devices())
    found = []
    for kind, count in counts.items():
        own = [device for device in jax.local_devices() if device.device_kind == kind]
        stats = (own[0].memory_stats() if own else None) or {}
        row = listed(kind)
        found.append(
            {
                "kind": kind,
                "count": count,
                "local": len(own),
                "memory_bytes": stats.get("bytes_limit"),
                "bfloat16_flops": row.bfloat16 * 1e12 if row is not None else None,
            }
        )
    return found


def _interconnect() -> str:
    """How the devices are joined, in words: those of this process, and the processes."""
    count = process_count()
    return _links() + (f"; {count} processes over the network" if count > 1 else "")


def _links() -> str:
    if len(jax.local_devices()) == 1:
        return "one device"
    match jax.default_backend():
        case "gpu":
            return _gpu_links() or "not known (nvidia-smi topo -m does not say)"
        case "tpu":
            coords = np.array([device.coords for device in jax.devices()])
            return "ICI, torus " + " × ".join(map(str, np.ptp(coords, axis=0) + 1))
    return "the memory of this process"


def _gpu_links() -> str | None:
    """The kinds of links between GPUs from `nvidia-smi topo -m`: NV18 is 18 NVLinks, PIX to SYS are PCIe."""
    try:
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_links(done.stdout)


def parse_links(topology: str) -> str | None:
    """The links between GPUs in the output of `nvidia-smi topo -m`; None if there are none."""
    rows = [line.split() for line in topology.splitlines() if re.match(r"\S*GPU\d+\s", line)]
    cells = Counter(cell for row in rows for cell in row[1 : 1 + len(rows)] if cell != "X")
    named = [f"NVLink ({kind[2:]} links)" if kind.startswith("NV") else f"PCIe ({kind})" for kind in sorted(cells)]
    return " and ".join(named) or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
