"""The lock of a folder: one holder at a time, named by its process id, freed however its process ends."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest

from polygpt.checkpoint import folder_lock
from polygpt.errors import RequestError

HOLD = """
import sys, time
from pathlib import Path
from polygpt.checkpoint import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_holder_is_refused_and_nothing_is_left(tmp_path):
    with folder_lock(tmp_path):
        with pytest.raises(RequestError, match=rf"process {os.getpid()} is training in this folder.*kill"):
            folder_lock(tmp_path).__enter__()
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert not list(tmp_path.iterdir())
    with folder_lock(tmp_path):
        pass


def test_a_killed_process_frees_it(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RequestError, match=f"process {process.pid} is training"):
        folder_lock(tmp_path).__enter__()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / ".lock").exists()
    with folder_lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_file_that_its_owner_removes_just_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, removed = fcntl.flock, []

    def remove_first(descriptor, operation):
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with folder_lock(tmp_path), pytest.raises(RequestError, match="is training in this folder"):
        folder_lock(tmp_path).__enter__()
    assert removed
