"""The plan of a run on a mesh: bytes, FLOPs and seconds of each device, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polygpt.errors import RequestError, suggest
from polygpt.kernels import max_unrolled_layers
from polygpt.model import model_of
from polygpt.planning.program import Program
from polygpt.planning.request import check_layout
from polygpt.planning.roofline import Estimate, estimate
from polygpt.planning.worker import compile_elsewhere
from polygpt.sharding import MESH_AXES, MeshConfig
from polygpt.training import ACCELERATORS, RunConfig, listed, listed_peak

# The share of a device's memory that a program can have: the rest is the runtime's, and lost between buffers.
USABLE = 0.92


@dataclass(frozen=True)
class Plan:
    """A run on a mesh of accelerators. Everything but `devices` is of one device.

    Attributes:
        config: the run.
        accelerator: one of `ACCELERATORS`.
        program: what was compiled.
        estimate: how long a step takes.
        notes: what every device holds whole since it cannot be split evenly.
    """

    config: RunConfig
    accelerator: str
    program: Program
    estimate: Estimate
    notes: tuple[str, ...] = ()

    @property
    def mesh(self) -> dict[str, int]:
        """The mesh's axes."""
        return dict(zip(MESH_AXES, (self.config.mesh or MeshConfig()).shape, strict=True))

    @property
    def devices(self) -> int:
        """The devices of the whole mesh."""
        return (self.config.mesh or MeshConfig()).devices

    @property
    def tokens(self) -> int:
        """In a step, on all devices."""
        return self.config.training.batch_size * self.config.model.context_length

    @property
    def fits(self) -> bool:
        """Whether the peak is within the memory that a program can have."""
        return self.program.peak_bytes <= USABLE * memory_of(self.accelerator)

    @property
    def utilization(self) -> float:
        """The model's FLOPs as a share of what the device could compute in a step of the estimated length."""
        model = self.config.model
        flops = model_of(model).flops_per_token * self.tokens / self.devices
        peak = listed_peak(ACCELERATORS[self.accelerator], model.compute_dtype, model.matmul_precision)
        return flops / (peak * self.estimate.step_seconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        program = self.program
        return {
            "devices": self.devices,
            "mesh": self.mesh,
            "accelerator": self.accelerator,
            "memory_bytes": memory_of(self.accelerator),
            "batch_size": self.config.training.batch_size,
            "tokens_per_step": self.tokens,
            "parameter_bytes": program.parameter_bytes,
            "optimizer_bytes": program.optimizer_bytes,
            "activation_bytes": program.temporary_bytes,
            "peak_bytes": program.peak_bytes,
            "flops_per_step": sum(program.flops.values()),
            "collective_bytes": program.collective_bytes,
            "step_seconds": self.estimate.step_seconds,
            "product_seconds": self.estimate.product_seconds,
            "memory_seconds": self.estimate.memory_seconds,
            "collective_seconds": self.estimate.collective_seconds,
            "utilization": self.utilization,
            "fits": self.fits,
            "notes": list(self.notes),
            "compile_seconds": program.compile_seconds,
        }


def make_plan(config: RunConfig, accelerator: str) -> Plan:
    """Compiles the step of `config` (see `planned_run`) and estimates it on `accelerator`.

    Raises:
        RequestError: there is no such accelerator, the layout is not possible, or the step cannot be traced for it.
        PolygptError: it cannot be compiled.
    """
    if accelerator not in ACCELERATORS:
        raise RequestError(f"no accelerator '{accelerator}' is known; {suggest(accelerator, ACCELERATORS)}")
    notes = tuple(check_layout(config))
    program = compile_elsewhere(_unrolled_as_on(accelerator, config))
    mesh = dict(zip(MESH_AXES, (config.mesh or MeshConfig()).shape, strict=True))
    seconds = estimate(program, mesh, accelerator, config.model.matmul_precision)
    return Plan(config, accelerator, program, seconds, notes)


def _unrolled_as_on(accelerator: str, config: RunConfig) -> RunConfig:
    """The run with its layers unrolled if they are on the accelerator: the process that compiles has only a CPU."""
    model, is_gpu = config.model, ACCELERATORS[accelerator].startswith("NVIDIA")
    if not is_gpu or model.scan_layers is not None or config.mesh is not None or config.training.remat != "none":
        return config
    scans = model.num_layers > max_unrolled_layers(training=True, backend="gpu")
    return config.model_copy(update={"model": model.model_copy(update={"scan_layers": scans})})


def memory_of(accelerator: str) -> int:
    """Bytes of memory of an accelerator."""
    return round(listed(ACCELERATORS[accelerator]).memory * 1e9)
