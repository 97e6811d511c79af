"""The process: how it was called, and settings that a program makes for itself before it computes."""

from __future__ import annotations

import _thread
import ctypes
import os
import shlex
import shutil
import signal
import sys
import threading
from functools import cache
from pathlib import Path

# glibc's mallopt parameters (malloc.h), and madvise's MADV_HUGEPAGE.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_HUGE_PAGE_ADVICE, _HUGE_PAGE = 14, 2**21
# Part of the machine's memory within which freed blocks are kept.
_KEPT = 1 / 8
# Where a container's memory limit stands (cgroup 2 and 1).
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
# With more cores than this, threads would wait for each other at the one heap (measured on two only).
_MAX_CORES = 16

_not_kept: list[str] = []


def memory_not_kept() -> str | None:
    """Why `keep_freed_memory` could not do what it was called for; None where it did, or was not asked to."""
    return _not_kept[0] if _not_kept else None


@cache
def keep_freed_memory() -> bool:
    """Makes the C library keep freed memory for the next training step; returns whether it does.

    XLA allocates its temporaries anew in every step, on whichever of its threads runs it. glibc gives each thread a
    heap of its own, unmaps what becomes free there, and serves large blocks by mmap, so that every step faults in
    every page again. Here all threads share one heap, which starts with an eighth of the machine's memory as reserved
    address space in huge pages. What fits into that is never given back; a large block that does not fit is mapped
    and unmapped as before, so that fragmentation costs an eighth of the memory at most.

    On two cores (Zen 4, 24 GB, transparent huge pages at `madvise`), before and after: a step of the demo 16,800 page
    faults and 1, 38 and 6 ms in the kernel, 85 and 60 ms in all, and its whole training 570 and 675 MB at its peak; a
    step of the benchmark `gpt_256` 237,000 faults and 0, 570 and 10 ms in the kernel, 1,790 and 1,270 ms in all, 1.4
    and 3.1 GB at its peak, since a step's temporaries may be allocated before those of the last are free.
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1, which only the environment can set, takes 70 and 1,410 ms and no more memory
    than before; MALLOC_ARENA_MAX=1 alone 840 and 28,000 faults.

    It must be called before other threads start. POLYGPT_KEEP_MEMORY=0 turns it off, and so do glibc's own variables
    for malloc, which are left to say what they say.
    """
    if not sys.platform.startswith("linux") or (os.cpu_count() or 1) > _MAX_CORES or _chosen_by_the_user():
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc, free, madvise = libc.mallopt, libc.malloc, libc.free, libc.madvise
    except (OSError, AttributeError):
        _not_kept.append("the C library is not glibc")
        return False
    malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    free.argtypes, madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = int(_KEPT * machine_memory())
    # The reserved block must come from the heap itself rather than from mmap, and stay with it when it is freed.
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
    block = malloc(size)
    mallopt(_MMAP_MAX, 2**16)  # as it was
    if block is None:
        mallopt(_TRIM_THRESHOLD, 2**17)  # as it was
        _not_kept.append(f"{size / 2**20:,.0f} MB of address space could not be reserved (ulimit -v?)")
        return False
    start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
    madvise(start, block + size - start, _HUGE_PAGE_ADVICE)  # without huge pages in the kernel, small ones are kept
    free(block)
    return bool(mallopt(_ARENA_MAX, 1) and mallopt(_MMAP_THRESHOLD, 2**25))


def _chosen_by_the_user() -> bool:
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(x.startswith("MALLOC_") for x in os.environ)
    return tuned or os.environ.get("POLYGPT_KEEP_MEMORY") == "0"


def machine_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's if that is less."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = [path.read_text().strip() for path in _MEMORY_LIMITS if path.is_file()]
    return min([whole, *(int(limit) for limit in found if limit.isdigit())])


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
        again = threading.Timer(0.1, _thread.interrupt_main, [getattr(dropped.exc_type, "number", signal.SIGINT)])
        again.daemon = True
        again.start()

    sys.unraisablehook = hook


def command_line(*words: str | os.PathLike) -> str:
    """A command of polygpt as the user can type it here: by name where that is on the PATH, else by where it lies."""
    called = Path(sys.argv[0])
    by_path = called.name == "polygpt" and shutil.which("polygpt") is None
    program = os.path.relpath(called) if by_path else "polygpt"
    return shlex.join([program, *map(str, words)])
