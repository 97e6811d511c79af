"""How polygpt says it is to be called, the memory it keeps, and that it hears an interruption wherever it comes."""

import os
import platform
import subprocess
import sys

import pytest

from polygpt import process
from polygpt.process import command_line


def test_a_command_is_named_by_its_path_where_it_is_not_on_the_path(monkeypatch, tmp_path):
    program = tmp_path / ".venv" / "bin" / "polygpt"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv("PATH", "")
    assert command_line("generate", "my runs/a") == ".venv/bin/polygpt generate 'my runs/a'"
    monkeypatch.setenv("PATH", os.fspath(program.parent))
    assert command_line("generate", "a") == "polygpt generate a"


INTERRUPTED_IN_A_FINALIZER = """
import gc, os, signal, sys, time
from polygpt.process import keep_interrupts

if sys.argv[1] == "kept":
    keep_interrupts()
signals = iter([signal.SIGINT])
gc.callbacks.append(lambda phase, info: [os.kill(os.getpid(), number) for number in signals])
try:
    gc.collect()
    time.sleep(1)
    print("went on")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interruption_that_python_drops_comes_again():
    def told(how):
        words = [sys.executable, "-c", INTERRUPTED_IN_A_FINALIZER, how]
        return subprocess.run(words, capture_output=True, text=True, timeout=60).stdout.strip()

    assert told("dropped") == "went on"  # what Python does by itself
    assert told("kept") == "interrupted"


# Blocks that two threads at a time allocate, fill and free, as a training step's temporaries are; 8 and 48 MB lie on
# either side of what the C library by itself would map. Then the page faults of a round, once all has been seen.
FAULTS = """
import ctypes, resource, sys, threading
from polygpt import process

kept = process.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def use():
    blocks = [libc.malloc(size << 20) for size in (8, 48)]
    for block, size in zip(blocks, (8, 48)):
        ctypes.memset(block, 1, size << 20)
    for block in blocks:
        libc.free(block)

def round():
    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

for _ in range(5):
    round()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    round()
faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5
print(kept, process.memory_not_kept() or "-", int(faults), sep="|")
"""


def faults_a_round(limit: str = "", **environment: str) -> tuple[str, str, int]:
    """Whether memory is kept, why not, and page faults a round, in a process of its own."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "POLYGPT_"))
    }
    shell = f"{limit}exec {sys.executable} -c '{FAULTS}'"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=60, env=clean | environment)
    assert done.returncode == 0, done.stderr
    kept, reason, faults = done.stdout.strip().split("|")
    return kept, reason, int(faults)


needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or (os.cpu_count() or 1) > 16, reason="set for glibc on up to 16 cores"
)
A_ROUND = 2 * (8 + 48) * 2**20 // 4096  # pages


@needs_glibc
def test_freed_memory_is_kept_in_every_thread():
    kept, reason, faults = faults_a_round()
    assert (kept, reason) == ("True", "-")
    assert faults < A_ROUND // 10


@needs_glibc
@pytest.mark.parametrize(
    "chosen", [{"POLYGPT_KEEP_MEMORY": "0"}, {"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}]
)
def test_the_users_own_settings_of_malloc_stand(chosen):
    kept, reason, faults = faults_a_round(**chosen)
    assert (kept, reason) == ("False", "-")
    assert faults > A_ROUND // 2  # what glibc does by itself


@needs_glibc
def test_what_cannot_be_kept_is_said():
    kept, reason, _ = faults_a_round(limit="ulimit -v 600000; ")
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") > 8 * 2**30:
        assert kept == "False"
        assert "address space could not be reserved" in reason


def test_a_containers_limit_counts_as_the_memory(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(process, "_MEMORY_LIMITS", (limit, tmp_path / "none"))
    whole = process.machine_memory()
    for text, expected in [("max\n", whole), ("1073741824\n", 2**30), (f"{2 * whole}\n", whole)]:
        limit.write_text(text)
        assert process.machine_memory() == expected
