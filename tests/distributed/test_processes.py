"""Real processes on this machine that agree, refuse to start, stop together and notice each other's end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "agreeing.py"


def start(folder, count, *cases, **env):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "env": {**os.environ, **env}}
    command = [sys.executable, str(SCRIPT), address, str(count)]
    return [subprocess.Popen([*command, str(index), str(folder), *cases], **pipes) for index in range(count)]


def results(processes):
    """What each process printed, by case, and its exit code and standard error."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=400)
        lines = [json.loads(line) for line in out.splitlines()]
        found.append(({line.pop("case"): line for line in lines}, process.returncode, err))
    return found


REFUSED = {
    "another_configuration": [
        "process 1 (",
        "has another configuration than process 0: training.batch_size 16, not 8; training.seed 1, not 0",
    ],
    "another_version": ["process 1 (", "has other versions of packages than process 0: flax 0.0.1, not "],
    "another_folder": [
        "process 1 (",
        "cannot see what process 0 (",
        "--out run must be in a folder that all processes",
    ],
    "other_data": ["process 1 (", "has other data than process 0: data tokens of 1, not tokens of 0"],
}


@pytest.fixture(scope="module")
def agreed(tmp_path_factory):
    """Two processes that go through many cases; folder, and results of each."""
    folder = tmp_path_factory.mktemp("agreed")
    return folder, results(start(folder, 2, "exchanges", "same", *REFUSED, "stopping", "failing"))


def test_processes_exchange_values_and_follow_process_0(agreed):
    _, found = agreed
    for cases, _, err in found:
        assert cases["exchanges"]["value"] == [[{"own": 0}, {"own": 1}], "of 0", [None, None]], err
        assert cases["same"] == {"value": "agreed"}


def test_no_probe_of_the_folder_is_left(agreed):
    folder, _ = agreed
    assert not list(folder.rglob("*"))


@pytest.mark.parametrize("case", REFUSED)
def test_processes_that_differ_all_refuse_and_say_what_differs(agreed, case):
    folder, found = agreed
    said, other = (cases[case] for cases, _, _ in found)
    assert other["error"].replace(f"{folder}/1", f"{folder}/0") == said["error"]
    assert said["code"] == 2
    assert len(said["error"].splitlines()) <= 3
    for part in REFUSED[case]:
        assert part in said["error"]


def test_a_signal_to_one_stops_all_after_the_same_step(agreed):
    _, found = agreed
    ahead, behind = (cases["stopping"]["value"] for cases, _, _ in found)
    assert ahead == behind
    assert ahead[0] > 5
    assert ahead[1] == signal.SIGTERM


def test_the_error_of_one_process_is_that_of_all(agreed):
    _, found = agreed
    (waiting, code, _), (failing, own_code, _) = found
    assert failing["failing"] == {"error": "the text is missing", "code": 2}
    assert waiting["failing"]["error"].startswith("process 1 of 2 (")
    assert waiting["failing"]["error"].endswith(" stopped: the text is missing")
    assert (code, own_code) == (2, 2)


def test_a_process_that_no_longer_runs_ends_the_others_within_the_time_stated(tmp_path):
    processes = start(tmp_path, 2, "silent", POLYGPT_HEARTBEAT_SECONDS="4")
    begun = time.monotonic()
    _, err = processes[0].communicate(timeout=400)
    assert time.monotonic() - begun < 200  # far more than the limit of 4 s: other work of the machine counts here
    processes[1].send_signal(signal.SIGKILL)
    processes[1].communicate()
    assert processes[0].returncode == 1, err
    assert "process 1 of 2 has given no sign of life for 4 s" in err
