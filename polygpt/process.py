"""The process: how it was called, and settings that a program makes for itself before it computes."""

from __future__ import annotations

import _thread
import ctypes
import os
import shlex
import shutil
import sys
import threading
from functools import cache
from pathlib import Path

# glibc's mallopt parameters (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


@cache
def keep_freed_memory() -> bool:
    """Has the C library keep freed memory for the next step rather than give it back; says whether it could.

    XLA allocates its temporaries anew at every step. glibc serves blocks of that size by mmap and unmaps them when
    they are freed, so that every step faults in every page again: with this setting a step of a small model on two
    cores took 42 ms, without it 68.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, 2**31 - 1), mallopt(_TOP_PAD, 2**26)])


def keep_interrupts() -> None:
    """Has an interruption that Python drops come once more, a moment later.

    A KeyboardInterrupt that a signal raises within a finalizer or a callback of the garbage collector, of which JAX has
    one, is dropped by Python: of 300 signals sent to a loop that allocates lists, 144 were lost so.
    """
    others = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            others(dropped)
            return
        # By then the callback is over, and this hook: after 0.01 s it was not always, on a machine that was busy.
        again = threading.Timer(0.1, _thread.interrupt_main)
        again.daemon = True
        again.start()

    sys.unraisablehook = hook


def command_line(*words: str | os.PathLike) -> str:
    """A command of polygpt as the user can type it here: by name where that is on the PATH, else by where it lies."""
    called = Path(sys.argv[0])
    by_path = called.name == "polygpt" and shutil.which("polygpt") is None
    program = os.path.relpath(called) if by_path else "polygpt"
    return shlex.join([program, *map(str, words)])
