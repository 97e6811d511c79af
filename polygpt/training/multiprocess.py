"""A run of several processes: what they must have in common, and how they open it. Alone, a process does as before."""

from __future__ import annotations

import dataclasses
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from polygpt.distributed import agree, exchange, main_decides, process_count
from polygpt.training.config import RunConfig
from polygpt.training.events import RunResult
from polygpt.training.resume import finished_result, with_changes
from polygpt.training.run_folder import Run, open_run
from polygpt.training.saving import fingerprints

_PACKAGES = ("polygpt", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def check_same_request(config: RunConfig | None, out: Path, resume: bool) -> None:
    """Refuses processes with another configuration, folder, platform or version of a package.

    Raises:
        RequestError: names the process and what differs.
    """
    if process_count() == 1:
        return
    versions = {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()}
    agree("other versions of packages", versions)
    agree("another kind of device", {"platform": jax.default_backend()})
    request = {"--out": str(out), "--resume": resume}
    agree("another configuration", request | ({} if config is None else _flat(config.to_dict())))


def opened_by_all(run: Run | None, config: RunConfig | None, out: Path, resume: bool) -> Run:
    """The run that process 0 has opened or created, on every process.

    Args:
        run: on process 0, what it has opened; None on the others, which open it now.

    Raises:
        RequestError: a process reads other data.
    """
    if process_count() == 1:
        return run
    exchange("opened", None)
    if run is None:
        run = open_run(out)
        if resume and config is not None:
            run, _ = with_changes(run, config)
    agree("other data", {**fingerprints(run), "held-out text": run.shards.validation.fingerprint})
    return run


def finished_by_all(out: Path, steps: int) -> RunResult | None:
    """`finished_result`, as process 0 finds it."""

    def find() -> dict[str, Any] | None:
        found = finished_result(out, steps)
        return None if found is None else dataclasses.asdict(found)

    found = main_decides("finished", find)
    return None if found is None else RunResult(**found)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """A nested configuration as dotted keys."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    found = {}
    for name, inner in value.items():
        found |= _flat(inner, f"{key}.{name}" if key else name)
    return found
