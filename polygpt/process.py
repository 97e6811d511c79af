"""Settings of the process that a program sets for itself before it computes; a library user may leave them out."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

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
