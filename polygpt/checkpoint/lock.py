"""A lock that keeps a second process from writing into a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from polygpt.errors import PolygptError, RequestError

try:
    import fcntl
except ImportError:  # not a Unix system: folders are not locked there
    fcntl = None

LOCK = ".lock"


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder`, the file `.lock` in it, which contains the process id.

    The operating system releases the lock when the process ends, however it ends; a file left by a killed process does
    no harm.

    Raises:
        RequestError: another process holds the lock; its id is named.
        PolygptError: the folder cannot be written.
    """
    if fcntl is None:
        yield
        return
    path = folder / LOCK
    try:
        descriptor = _acquire(path)
    except OSError as error:
        raise PolygptError(f"{folder}: cannot be written ({error.strerror or error})") from None
    try:
        yield
    finally:
        with suppress(OSError):  # removed while it is still held, so that nobody else's file is
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file(descriptor, path):
                _write_process_id(descriptor, path)
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace") or "unknown"
            os.close(descriptor)
            raise RequestError(
                f"{path.parent}: process {holder} is training in this folder; wait until it ends, or stop it first "
                f"(kill {holder})"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner removed the file between our opening and locking it


def _write_process_id(descriptor: int, path: Path) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    except OSError:  # on a full disk no empty file stays
        path.unlink(missing_ok=True)
        raise


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
