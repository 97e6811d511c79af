"""Signals: looked at between steps, saved, told how to go on; and a second one is obeyed at once."""

import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from polygpt.training import Interrupted
from polygpt.training.interrupt import InterruptFlag
from polygpt.training.run_folder import read_lines

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_raises_the_flag_and_handlers_come_back(number):
    before = [signal.getsignal(n) for n in SIGNALS]
    with InterruptFlag() as flag:
        assert not flag.raised
        signal.raise_signal(number)
        assert flag.raised
    assert [signal.getsignal(n) for n in SIGNALS] == before


@pytest.mark.parametrize("first", SIGNALS)
def test_a_second_ctrl_c_interrupts_at_once(first):
    with InterruptFlag():
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_another_thread_leaves_signals_alone():
    seen = []

    def work():
        with InterruptFlag() as flag:
            seen.append((flag.raised, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGTERM))]


def test_the_way_on_can_be_pasted_into_a_shell():
    error = Interrupted(7, Path("my runs/it's"))
    assert error.exit_code == 130
    assert str(error).startswith("interrupted after step 7, which is saved; go on with: polygpt train --resume")
    command = str(error).partition("go on with: ")[2]
    assert subprocess.check_output(["sh", "-c", f"printf '%s\\n' {command}"], text=True).endswith("\nmy runs/it's\n")


def wait_until(ready, process, seconds=90):
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing came in time"
        time.sleep(0.02)


def steps_done(run):
    return max((line["step"] for line in read_lines(run / "metrics.jsonl")), default=0)


def saved_steps(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))


def test_a_real_process_saves_says_how_to_go_on_and_the_words_work(workdir):
    run = workdir / "my runs" / "a"
    polygpt = f"{sys.executable} -m polygpt"
    settings = {"shell": True, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = (
        "polygpt train tiny.yaml training.steps=1000000 training.log_every=1 training.save_every=0 --out 'my runs/a'"
    )
    last = 0
    for number in SIGNALS:
        process = subprocess.Popen("exec " + command.replace("polygpt", polygpt, 1), **settings)
        wait_until(lambda last=last: steps_done(run) > last + 1, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=90)
        assert process.returncode == 128 + number, err
        assert out == ""
        told = re.search(r"^polygpt: interrupted after step (\d+), which is saved; go on with: (.*)\n\Z", err, re.M)
        assert told, err
        assert "Traceback" not in err
        step, command = int(told[1]), told[2]
        assert step > last
        assert saved_steps(run)[-1] == step
        assert [line["step"] for line in read_lines(run / "metrics.jsonl") if "loss" in line] == [*range(1, step + 1)]
        last = step
    assert "going on after step" in err


def test_a_process_that_is_terminated_while_it_prepares_leaves_nothing(workdir, snapshot):
    before = snapshot(workdir)
    words = ["train", "tiny.yaml", "data.path=builtin", "tokenizer.kind=byte", "--out", "new/run"]
    process = subprocess.Popen([sys.executable, "-m", "polygpt", *words], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: any(workdir.glob("new/.run.*")), process)
    process.terminate()
    _, err = process.communicate(timeout=90)
    assert (process.returncode, err.splitlines()[-1]) == (143, "polygpt: interrupted")
    assert "Traceback" not in err
    assert snapshot(workdir) == before


def test_a_terminal_gets_its_cursor_back(workdir):
    master, slave = pty.openpty()
    words = ["train", "tiny.yaml", "training.steps=1000000", "--out", "run"]
    environment = os.environ | {"TERM": "xterm-256color"}
    process = subprocess.Popen([sys.executable, "-m", "polygpt", *words], stderr=slave, env=environment)
    os.close(slave)
    seen = bytearray()

    def read():
        while True:
            try:
                seen.extend(os.read(master, 1 << 16))
            except OSError:  # the other end is closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: b"tokens/s" in seen, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 130
    reader.join()
    os.close(master)
    assert seen.rfind(b"\x1b[?25h") > seen.rfind(b"\x1b[?25l") >= 0
    assert b"go on with: polygpt train --resume --out run" in seen
