"""Preparation on a Ray cluster: the same tasks, each run by whatever node is free.

The cluster is the one that RAY_ADDRESS names (host:port, or `auto`), or else one that is started on this machine. Its
nodes must have polygpt installed, and share the folder of the work and the source's files under the same paths.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polygpt.data.tasks import PLAN, describe, finished, read_plan
from polygpt.data.worker import answer
from polygpt.errors import PolygptError, RequestError

if TYPE_CHECKING:
    from polygpt.data.workers import Pool

TRIES = 3
PATIENCE = 5.0  # seconds until a cluster that does not answer is given up


def distribute(pool: Pool, workers: int) -> None:
    """Runs the tasks of `pool` on the cluster, at most `workers` at a time; failures are left in `pool.errors`.

    Raises:
        RequestError: Ray is not installed, or RAY_ADDRESS is none.
        PolygptError: the cluster does not answer.
    """
    with _connected(workers) as ray:
        # A task whose node or process dies is run again, on another node if need be.
        remote = ray.remote(_run).options(num_cpus=1, max_retries=TRIES - 1)
        running: dict[Any, int] = {}

        def start() -> None:
            while len(running) < workers and (task := pool.next()) is not None:
                running[remote.remote(str(pool.work), task, pool.made.config.batch_chars)] = task

        start()
        while running:
            [done], _ = ray.wait(list(running), num_returns=1)
            task = running.pop(done)
            try:
                found = ray.get(done)
            except ray.exceptions.RayError as error:
                part = describe(pool.made.tasks[task].part)
                pool.errors[task] = PolygptError(
                    f"{part}: the Ray task that prepares it died {TRIES} times ({type(error).__name__}); it may need "
                    "more memory"
                )
            else:
                if "counts" in found and finished(pool.work, task, pool.made) is None:
                    found = {"error": _not_shared(pool.work, found["node"]), "kind": "RequestError"}
                pool.take(task, found)
            start()


def _run(work: str, task: int, batch_chars: int) -> dict[str, Any]:
    """The answer to a task, on the node where this runs."""
    node, folder = socket.gethostname(), Path(work)
    if not (folder / PLAN).is_file():
        return {"error": _not_shared(folder, node), "kind": "RequestError"}
    return {**answer(folder, task, *read_plan(folder, batch_chars)), "node": node}


def _not_shared(work: Path, node: str) -> str:
    return f"{work}: the node {node} of the Ray cluster has another folder there; choose an --out that all nodes share"


@contextmanager
def _connected(workers: int) -> Iterator[Any]:
    """The module `ray`, connected to a cluster; one that was started here ends afterwards."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise RequestError(
            "data.engine=ray needs the package ray: pip install 'polygpt[ray]' (data.engine=local needs none)"
        ) from None
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS")
    if address is not None:
        _check_answers(address)
    size = {} if address is not None else {"num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level="error", **size)
    except Exception as error:  # of the library and its processes, of many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PolygptError(f"Ray: {address or 'a cluster on this machine'} cannot be used ({reason})") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Refuses an address at which nothing listens."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not (host and port.isdigit()):
        raise RequestError(f"RAY_ADDRESS={address}: must be host:port, or auto")
    with suppress(OSError), socket.create_connection((host, int(port)), PATIENCE):
        return
    raise PolygptError(f"RAY_ADDRESS={address}: no Ray cluster answers there; `ray status` shows whether one runs")
