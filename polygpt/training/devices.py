"""What a device can compute, from a table or measured; what share of it, and how much memory, training uses."""

from __future__ import annotations

import os
import re
import resource
import sys
import time
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp

from polygpt.cache import kept
from polygpt.model import Model

# Seconds that measuring a peak may take, compiling excluded.
BUDGET = 0.12
LARGEST = 8192


class Peak(NamedTuple):
    """Dense peaks in TFLOP/s of the devices whose `device_kind` matches `name`; 0: not native, computed in float32.

    What planning needs besides is known of the `ACCELERATORS` alone, and 0 for the others.

    Attributes:
        memory: GB that the device has.
        bandwidth: TB/s between the device and its memory.
        link: GB/s that a device sends along one mesh axis while it receives as much, within an island.
        island: how many devices are joined by such links.
        network: GB/s that a device sends to other islands.
    """

    name: str
    float32: float
    tfloat32: float
    bfloat16: float
    float16: float
    memory: float = 0
    bandwidth: float = 0
    link: float = 0
    island: int = 1
    network: float = 0


# From the vendors' data sheets, without sparsity and accumulating in float32: NVIDIA's for each card (for GeForce cards
# the architecture white papers of Ampere GA102, Ada and Blackwell, appendix A), Google Cloud's "TPU architecture" pages
# for each version (v3 is per core, which is one device of JAX). An SXM and a PCIe card of one name differ.
# Memory and links from the same sheets. DGX and HGX H100 and H200: 8 cards by NVLink (900 GB/s, half of it in each
# direction) and a 400 Gb/s adapter each. TPUs: a ring along one axis of the torus uses two links, each 90 GB/s in each
# direction ("How to Scale Your Model", chapter 2, measured; the data sheets say 100); slices up to the size of a pod
# are one island, and a host's network is shared by its chips (6.25 GB/s each, the same chapter).
PEAKS = (
    Peak(r"NVIDIA A100.*", 19.5, 156, 312, 312),
    Peak(r"NVIDIA H100 PCIe", 51, 378, 756, 756),
    Peak(r"NVIDIA H(100|200) NVL", 60, 417.5, 835, 835),
    Peak(r"NVIDIA H100 80GB HBM3", 67, 494.5, 989, 989, 80, 3.35, 450, 8, 50),
    Peak(r"NVIDIA H200", 67, 494.5, 989, 989, 141, 4.8, 450, 8, 50),
    Peak(r"NVIDIA B200.*", 75, 1100, 2250, 2250),
    Peak(r"NVIDIA L4", 30.3, 60.5, 121, 121),
    Peak(r"NVIDIA L40S", 91.6, 183, 362, 362),
    Peak(r"NVIDIA A10", 31.2, 62.5, 125, 125),
    Peak(r"(NVIDIA )?(Tesla )?T4", 8.1, 0, 0, 65),
    Peak(r"(NVIDIA )?(Tesla )?V100-PCIE.*", 14, 0, 0, 112),
    Peak(r"(NVIDIA )?(Tesla )?V100-SXM.*", 15.7, 0, 0, 125),
    Peak(r"NVIDIA GeForce RTX 3090", 35.6, 35.6, 71, 71),
    Peak(r"NVIDIA GeForce RTX 4090", 82.6, 82.6, 165.2, 165.2),
    Peak(r"NVIDIA GeForce RTX 5090", 104.8, 104.8, 209.5, 209.5),
    Peak(r"TPU v3", 61.5 / 6, 61.5, 61.5, 0),
    Peak(r"TPU v4", 275 / 6, 275, 275, 0),
    Peak(r"TPU v5 ?(lite|e)", 197 / 6, 197, 197, 0),
    Peak(r"TPU v5p?", 459 / 6, 459, 459, 0, 95, 2.765, 180, 8960, 6.25),
    Peak(r"TPU v6 ?(lite|e)", 918 / 6, 918, 918, 0, 32, 1.64, 180, 256, 6.25),
)

# Accelerators that can be planned for, by the name they are asked for: JAX's `device_kind`.
ACCELERATORS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200", "v5p": "TPU v5", "v6e": "TPU v6 lite"}


def listed(kind: str) -> Peak | None:
    """The row of the table for the device `kind` (JAX's `device_kind`); None if it is not listed."""
    return next((peak for peak in PEAKS if re.fullmatch(peak.name, kind)), None)


def listed_peak(kind: str, dtype: str, precision: str | None = None) -> float | None:
    """FLOP/s of the device `kind` (JAX's `device_kind`) from the table; None if it is not listed.

    By default float32 products are computed in TF32 on NVIDIA's GPUs and in bfloat16 on TPUs (`tfloat32` in the table);
    with the precision `highest`, in float32 (six bfloat16 products on TPUs), and with `high`, in three products.
    """
    peak = listed(kind)
    if peak is None:
        return None
    fast = peak.tfloat32 or peak.float32
    full = {None: fast, "default": fast, "high": max(fast / 3, peak.float32)}.get(precision, peak.float32)
    return 1e12 * (full if dtype == "float32" else getattr(peak, dtype) or fast)


@cache
def measured_peak(device: jax.Device, dtype: str) -> float:
    """FLOP/s of the largest product of square matrices that fits into the time budget; kept in the cache folder."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return kept(["peak", device.platform, device.device_kind, dtype, cores], lambda: _time_products(device, dtype))


def _time_products(device: jax.Device, dtype: str) -> float:
    best, left, size = 0.0, BUDGET, 256
    product = jax.jit(jnp.matmul)
    while size <= LARGEST:
        matrix = jax.device_put(jnp.full((size, size), 0.5, dtype), device)
        product(matrix, matrix).block_until_ready()  # compiles
        seconds = []
        for _ in range(3):
            begun = time.perf_counter()
            product(matrix, matrix).block_until_ready()
            seconds.append(time.perf_counter() - begun)
        best = max(best, 2 * size**3 / min(seconds))
        left -= sum(seconds)
        if 8 * 4 * min(seconds) > left:  # the next one is eight times as long, and runs four times
            break
        size *= 2
    return best


class Utilization:
    """The share of the devices' peak that training uses; a peak that is exceeded is raised, so at most 1."""

    def __init__(self, model: Model, devices: int = 1):
        self.flops_per_token, self.config = model.flops_per_token / devices, model.config
        self.peak: float | None = None

    def __call__(self, tokens_per_second: float) -> float:
        """The share at this speed. The first call may measure the peak."""
        if self.peak is None:
            device, dtype = jax.local_devices()[0], jnp.dtype(self.config.compute_dtype).name
            precision = getattr(self.config, "matmul_precision", None)
            self.peak = listed_peak(device.device_kind, dtype, precision) or measured_peak(device, dtype)
        achieved = tokens_per_second * self.flops_per_token
        self.peak = max(self.peak, achieved)
        return achieved / self.peak


def peak_memory() -> int:
    """Bytes: the most that the first device has held or, if its runtime does not report that, the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(stats.get("peak_bytes_in_use", largest))
