"""What processes tell each other before and between computations: values, decisions, and that they agree."""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from polygpt.distributed.processes import check_others, client, is_main, next_key, process_count, process_index
from polygpt.errors import PolygptError, RequestError

# Seconds for which a process waits until a file that another one has written appears (network file systems cache).
APPEARS = 10.0
_MAX_NAMED = 5


def exchange(name: str, value: Any) -> list[Any]:
    """The `value` of every process, in their order. All must call it, in the same order; values are plain (JSON).

    Raises:
        ProcessFailedError: another process has failed.
    """
    if process_count() == 1:
        return [value]
    key = next_key(name)
    _set(f"{key}/{process_index()}", value)
    if is_main():  # collects for all, so that the messages grow with the number of processes, not its square
        _set(f"{key}/all", [value, *(_get(f"{key}/{index}") for index in range(1, process_count()))])
    return _get(f"{key}/all")


def main_decides(name: str, decide: Callable[[], Any]) -> Any:
    """What `decide`, which process 0 alone calls, returns (JSON), on every process.

    Raises:
        ProcessFailedError: another process has failed.
    """
    if process_count() == 1:
        return decide()
    key = next_key(name)
    if is_main():
        value = decide()
        _set(key, value)
        return value
    return _get(key)


def agree(what: str, facts: Mapping[str, Any]) -> None:
    """Refuses to go on unless every process has the same `facts`, a flat mapping; `what` says what others would be.

    Raises:
        RequestError: a process has others than process 0; the first few that differ are named, with both values.
    """
    if process_count() == 1:
        return
    found = exchange("agree", [socket.gethostname(), dict(facts)])
    first = found[0][1]
    for index, (host, theirs) in enumerate(found):
        names = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
        if names:
            named = [f"{name} {_spell(theirs.get(name))}, not {_spell(first.get(name))}" for name in names]
            more = [f"and {len(named) - _MAX_NAMED} more"] if len(named) > _MAX_NAMED else []
            raise RequestError(
                f"process {index} ({host}) has {what} than process 0: "
                + "; ".join([*named[:_MAX_NAMED], *more])
                + "\nall processes of a run need the same command, the same files and the same packages"
            )


@contextmanager
def shared_folder(folder: Path, setting: str) -> Iterator[None]:
    """Refuses a `folder` that not every process sees. Parents that had to be created are removed if they stay empty.

    Raises:
        RequestError: a process does not see what process 0 writes there; it is named.
        PolygptError: a process cannot write there; it is named.
    """
    if process_count() == 1:
        yield
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()] if is_main() else []
    try:
        with _probe(folder) as name:
            sees = is_main() or _appears(folder / name)
            seen = exchange("sees", [socket.gethostname(), sees, _write_error(folder / f"{name}-{process_index()}")])
        blind = [f"process {index} ({host})" for index, (host, sees, _) in enumerate(seen) if not sees]
        if blind:
            raise RequestError(
                f"{folder}: {', '.join(blind)} cannot see what process 0 ({seen[0][0]}) writes there; "
                f"{setting} must be in a folder that all processes share, such as one on a network file system"
            )
        unable = [f"process {index} ({host}: {error})" for index, (host, _, error) in enumerate(seen) if error]
        if unable:
            raise PolygptError(f"{folder}: {', '.join(unable)} cannot write there; every process writes its shards")
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def _probe(folder: Path) -> Iterator[str]:
    """The name of a file in `folder` that process 0 has written; it is removed at the end."""
    name = main_decides("probe", lambda: f".polygpt-{secrets.token_hex(8)}")
    path = folder / name
    if is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise PolygptError(f"{folder}: cannot be written ({error.strerror or error})") from None
    exchange("written", None)
    try:
        yield name
    finally:
        if is_main():
            with suppress(OSError):
                path.unlink()


def _write_error(path: Path) -> str | None:
    """Why this process cannot write a file there; None if it can."""
    try:
        path.touch()
        path.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _appears(path: Path) -> bool:
    end = time.monotonic() + APPEARS
    while not path.exists():
        if time.monotonic() > end:
            return False
        with suppress(OSError):  # reading the folder refreshes what a network file system has cached of it
            list(path.parent.iterdir())
        time.sleep(0.1)
    return True


def _set(key: str, value: Any) -> None:
    client().key_value_set(key, json.dumps(value))


def _get(key: str) -> Any:
    """The value of `key`, as soon as it is there; however long that takes, unless a process fails."""
    while True:
        try:
            return json.loads(client().blocking_key_value_get(key, 1000))
        except Exception as error:  # JAX's own: it has no class of its own for a time limit
            if "DEADLINE_EXCEEDED" not in str(error):
                raise PolygptError(f"the coordinator cannot be reached any more ({_first_line(error)})") from error
        check_others()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _spell(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "…"
