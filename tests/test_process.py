"""How polygpt says it is to be called, and that it hears an interruption wherever it comes."""

import os
import subprocess
import sys

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
