"""Processes meet at the coordinator's address before JAX joins them, so that a wrong start is explained.

JAX itself aborts, or waits, where two processes have one number or each counts another number of processes. So process
0 first listens there itself, for one line of JSON from each of the others, and answers each with a line: what is wrong,
or nothing. Then it frees the port for JAX.
"""

from __future__ import annotations

import errno
import json
import socket
import time
from contextlib import ExitStack, suppress
from typing import Any

from polygpt.errors import PolygptError, RequestError

GREETING = "polygpt"
# Seconds for which one that connects may be silent; and for which something else may answer at the address, such as a
# run that is about to end.
_SILENT, _FOREIGN = 2.0, 10.0
_MOST = 2**16


def wait_for_others(address: str, count: int, limit: float, setting: str) -> None:
    """Process 0's part: returns once all others have come, and the port is free again.

    Args:
        setting: the name of the setting that holds `limit`, in seconds.

    Raises:
        RequestError: the port cannot be listened on, two processes have one number, or one counts others than `count`.
        PolygptError: not all have come within `limit`.
    """
    port = int(address.rpartition(":")[2])
    try:
        server = _listening(port)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise RequestError(
            f"--coordinator {address}: process 0 cannot listen on port {port} ({reason}); choose another"
        ) from None
    with ExitStack() as opened:
        opened.enter_context(server)
        others: list[socket.socket] = []
        problem = _meet(server, others, opened, address, count, limit, setting)
        answer = {"greeting": GREETING, "error": problem and str(problem), "code": problem and problem.exit_code}
        for other in others:
            with suppress(OSError):
                _write(other, answer)
    if problem is not None:
        raise problem


def _meet(
    server: socket.socket,
    others: list[socket.socket],
    opened: ExitStack,
    address: str,
    count: int,
    limit: float,
    setting: str,
) -> PolygptError | None:
    """Waits until all have come, or something is wrong, which it returns; `others` are those that came."""
    hosts, end = {0: socket.gethostname()}, time.monotonic() + limit
    came: dict[int, socket.socket] = {}
    while len(hosts) < count or _forget_ended(hosts, came):
        server.settimeout(max(0.01, end - time.monotonic()))
        try:
            other = opened.enter_context(server.accept()[0])
        except TimeoutError:
            missing = [str(index) for index in range(count) if index not in hosts]
            named = f"process{'es' * (len(missing) > 1)} {', '.join(missing[:8])}{', …' * (len(missing) > 8)}"
            return PolygptError(
                f"not all {count} processes have come to the coordinator {address} within {limit:g} s ({setting}): "
                f"{named} did not; start each of them with this address and its own --process-id"
            )
        said = _read(other, _SILENT)
        if not isinstance(said, dict) or said.get("greeting") != GREETING:
            continue
        others.append(other)
        _forget_ended(hosts, came)  # one of them may be this one, started again
        if (problem := _wrong(said, hosts, count)) is not None:
            return problem
        hosts[said["index"]], came[said["index"]] = said["host"], other
    return None


def _wrong(said: dict[str, Any], hosts: dict[int, str], count: int) -> RequestError | None:
    """What is wrong with a process that has come, beside those that are here."""
    index, host = said["index"], said["host"]
    if said["count"] != count:
        return RequestError(
            f"process {index} ({host}) was started with --num-processes {said['count']}, process 0 ({hosts[0]}) with "
            f"{count}; all processes of a run need the same number"
        )
    if index in hosts:
        return RequestError(
            f"two processes were started with --process-id {index} (on {hosts[index]} and {host}); each needs its own, "
            f"0 to {count - 1}"
        )
    return None


def join(address: str, index: int, count: int, limit: float, setting: str) -> None:
    """The part of every other process: returns once process 0 says that all have come.

    Raises:
        RequestError: what process 0 finds wrong.
        PolygptError: process 0 does not answer within `limit` seconds, something else does, or not all have come.
    """
    host, _, port = address.rpartition(":")
    end, foreign, reason = time.monotonic() + limit, None, ""
    greeting = {"greeting": GREETING, "index": index, "count": count, "host": socket.gethostname()}
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=max(0.1, left)) as connection:
                _write(connection, greeting)
                # Process 0 may wait for the others as long as this one, and then says who is missing.
                answer = _read(connection, left + _SILENT)
        except OSError as error:
            answer, reason = None, error.strerror or str(error)
        if isinstance(answer, dict) and answer.get("greeting") == GREETING:
            if answer["error"] is None:
                return
            raise (RequestError if answer["code"] == RequestError.exit_code else PolygptError)(answer["error"])
        if answer is not None:
            foreign, reason = foreign or time.monotonic(), "something else does"
            if time.monotonic() - foreign > _FOREIGN:
                raise PolygptError(
                    f"{address}: something else answers there than process 0 of a run that is starting; choose another "
                    f"port, or wait until the run that has it is over"
                )
        time.sleep(0.2)
    raise PolygptError(
        f"the coordinator {address} does not answer ({reason or 'it is silent'}; {limit:g} s, {setting}); is process 0 "
        "running, and can this machine reach it at this address?"
    )


def _listening(port: int) -> socket.socket:
    """A server for IPv6 and IPv4, as JAX's, or for IPv4 alone where a machine has no IPv6."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise
    return socket.create_server(("", port))


def _forget_ended(hosts: dict[int, str], came: dict[int, socket.socket]) -> bool:
    """Forgets processes that came and have ended since; returns whether there were any."""
    ended = [index for index, connection in came.items() if _has_ended(connection)]
    for index in ended:
        del hosts[index], came[index]
    return bool(ended)


def _has_ended(connection: socket.socket) -> bool:
    """Whether the process at the other end has closed the connection; it sends nothing more otherwise."""
    connection.setblocking(False)
    try:
        return not connection.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _write(connection: socket.socket, value: dict[str, Any]) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def _read(connection: socket.socket, limit: float) -> Any:
    """The line that comes within `limit` seconds, read as JSON: bytes if it is none, None if nothing comes."""
    end, text = time.monotonic() + limit, b""
    while not text.endswith(b"\n") and len(text) < _MOST and (left := end - time.monotonic()) > 0:
        connection.settimeout(left)
        try:
            part = connection.recv(4096)
        except OSError:
            break
        if not part:
            break
        text += part
    try:
        return json.loads(text)
    except ValueError:
        return text or None
