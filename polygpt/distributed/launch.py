"""Starting: the coordinator's address and this process's number, from options or from a launcher, and joining."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polygpt.distributed.meeting import join, wait_for_others
from polygpt.distributed.processes import started
from polygpt.errors import PolygptError, RequestError

# Seconds within which all processes must have reached the coordinator, and after which a silent one counts as dead.
START_SECONDS, HEARTBEAT_SECONDS = 300, 60
START_SETTING, HEARTBEAT_SETTING = "POLYGPT_START_SECONDS", "POLYGPT_HEARTBEAT_SECONDS"

# Seconds, beyond twice ours, of JAX's own limit: ours includes the time that a process is given to end by itself.
_MARGIN = 15

# Launchers, by the variables that hold the number of processes and the number of this one. The first two are asked by
# jax.distributed.initialize() for the coordinator as well, if the variable in the last column is set.
_LAUNCHERS = (
    ("SLURM", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"),
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri"),
    ("MPI", "PMI_SIZE", "PMI_RANK", None),
)


@dataclass(frozen=True)
class Launch:
    """How processes find each other; what is None, JAX finds by itself.

    Attributes:
        coordinator: the address HOST:PORT at which process 0 listens.
        num_processes: how many there are.
        process_id: the number of this one, from 0.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def find_launch(
    coordinator: str | None, num_processes: int | None, process_id: int | None, env: Mapping[str, str] = os.environ
) -> Launch | None:
    """How this process is to join others, by its options or, without them, by its launcher; None if it is alone.

    Raises:
        RequestError: the options are incomplete or do not fit together, or a launcher started several processes and
            gives no coordinator.
    """
    name, count, rank, finds_coordinator = _launcher(env)
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS")
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise RequestError(
                "--num-processes and --process-id need the address of process 0: add --coordinator HOST:PORT"
            )
        if name is not None and not finds_coordinator:
            raise RequestError(
                f"{name} started this as process {rank} of {count}, but gives no address at which they could find each "
                "other; add --coordinator HOST:PORT, where HOST is that of process 0 and PORT any free one"
            )
        return Launch() if name is not None or _found_by_jax(env) else None
    num_processes = count if num_processes is None else num_processes
    process_id = rank if process_id is None else process_id
    _check(coordinator, num_processes, process_id)
    return Launch(coordinator, num_processes, process_id) if num_processes > 1 else None


def _launcher(env: Mapping[str, str]) -> tuple[str | None, int | None, int | None, bool]:
    """The launcher that started several processes: its name, how many, which one this is, whether JAX asks it."""
    for name, count, rank, coordinator in _LAUNCHERS:
        sizes = env.get(count, ""), env.get(rank, "")
        if all(size.isdigit() for size in sizes) and int(sizes[0]) > 1:
            if name == "SLURM" and coordinator not in env:  # the script of a job, outside srun: not a task
                continue
            return name, int(sizes[0]), int(sizes[1]), coordinator in env
    return None, None, None, False


def _found_by_jax(env: Mapping[str, str]) -> bool:
    """Whether this is a pod of an indexed Kubernetes job or a machine with TPUs, where JAX finds the others."""
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return True
    platforms = env.get("JAX_PLATFORMS", "tpu")
    if "tpu" not in platforms or not any(Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0")):
        return False
    return importlib.util.find_spec("libtpu") is not None


def _check(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise RequestError(f"--coordinator {coordinator}: HOST:PORT is needed, such as 10.0.0.1:1234")
    if num_processes is None or process_id is None:
        missing = "--num-processes" if num_processes is None else "--process-id"
        raise RequestError(
            f"--coordinator {coordinator}: {missing} is missing; each process is started with --coordinator HOST:PORT "
            "--num-processes N --process-id I, where I is 0 to N - 1"
        )
    if num_processes < 1:
        raise RequestError(f"--num-processes {num_processes}: at least 1 is needed")
    if not 0 <= process_id < num_processes:
        raise RequestError(
            f"--process-id {process_id}: with --num-processes {num_processes} it is one of 0 to {num_processes - 1}"
        )


def start(launch: Launch) -> None:
    """Joins the other processes; returns once all have come. Must be called before JAX is used.

    On CPUs, collectives use gloo. Processes send signs of life; see `watch.py` for what happens if one is silent.

    Raises:
        RequestError: the address cannot be listened on, its host is not known, two processes have one number, or they
            do not agree on how many they are.
        PolygptError: the coordinator does not answer, or not all processes come, within POLYGPT_START_SECONDS.
    """
    import jax

    if started():
        return
    limit = seconds(START_SETTING, START_SECONDS)
    if launch.coordinator is not None:
        _check_host(launch.coordinator)
        _meet(launch, limit)
    _keep_stdout()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler of SIGTERM would replace the one that saves before the run stops.
    jax.config.update("jax_enable_preemption_service", False)
    options: dict[str, Any] = {} if launch == Launch() else {"cluster_detection_method": "deactivate"}
    try:
        with _quiet(), _limited(limit, _incomplete(launch, limit)):
            jax.distributed.initialize(
                launch.coordinator,
                launch.num_processes,
                launch.process_id,
                # JAX ends a process by SIGABRT where its own limits are exceeded. Ours come first, and say more.
                initialization_timeout=2 * limit,
                heartbeat_timeout_seconds=2 * seconds(HEARTBEAT_SETTING, HEARTBEAT_SECONDS) + _MARGIN,
                **options,
            )
    except (RuntimeError, ValueError) as error:
        first = str(error).partition("\n")[0][:200]
        raise PolygptError(f"the processes could not join ({first}); {_FIX}") from error


def _meet(launch: Launch, limit: int) -> None:
    address, count = launch.coordinator, launch.num_processes
    if launch.process_id == 0:
        wait_for_others(address, count, limit, START_SETTING)
    elif launch.process_id is not None:
        join(address, launch.process_id, count, limit, START_SETTING)


def _keep_stdout() -> None:
    """Keeps standard output for what Python prints: gloo writes a line there for every connection."""
    sys.stdout.flush()
    own, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout = os.fdopen(own, "w", encoding="utf-8", errors="replace")


_FIX = "start each process with --coordinator HOST:PORT --num-processes N --process-id I"


def _incomplete(launch: Launch, limit: int) -> str:
    if launch.coordinator is None:
        return f"not all processes have come within {limit} s ({START_SETTING}); {_FIX}"
    return (
        f"not all {launch.num_processes} processes have come to the coordinator {launch.coordinator} within {limit} s "
        f"({START_SETTING}); start each of them with this address and its own --process-id"
    )


@contextmanager
def _limited(limit: float, message: str) -> Iterator[None]:
    """Ends the process with exit code 1 and `message` if what is done within takes longer than `limit` seconds."""

    def give_up() -> None:
        os.write(2, f"polygpt: {message}\n".encode())
        os._exit(1)

    timer = threading.Timer(limit, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences JAX's warnings about proxies and addresses."""
    logger = logging.getLogger("jax._src.distributed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_host(coordinator: str) -> None:
    host, _, port = coordinator.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise RequestError(f"--coordinator {coordinator}: there is no host '{host}' ({error.strerror})") from None


def seconds(setting: str, default: int) -> int:
    """A number of seconds from the environment.

    Raises:
        RequestError: it is no positive whole number.
    """
    text = os.environ.get(setting) or str(default)
    if not text.isdigit() or int(text) == 0:
        raise RequestError(f"{setting}={text}: a whole number of seconds is needed, at least 1")
    return int(text)
