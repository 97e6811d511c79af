"""Signals: looked at between steps, saved, told how to go on; and a second one is obeyed at once."""

import json
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

from polygpt import checkpoint
from polygpt.checkpoint import steps as steps_module
from polygpt.recipes import load_recipe
from polygpt.training import Interrupted, Stepped, Trainer, train
from polygpt.training.interrupt import InterruptFlag, Stop
from polygpt.training.listeners import RunFiles
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


def test_sigterm_while_a_step_is_being_saved_finishes_it(workdir, monkeypatch):
    write = steps_module._write_json

    def slowly(path, value):
        if value.get("step") == 2 and path.name == "info.json":
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        elif value.get("step", 0) > 2 and path.name == "manifest.json":
            time.sleep(0.3)  # the last step is waited for, too
        write(path, value)

    monkeypatch.setattr(steps_module, "_write_json", slowly)
    with pytest.raises(Interrupted) as error:
        train(load_recipe("tiny.yaml", {"training.steps": 2000}), "run", listeners=[])
    assert error.value.exit_code == 143
    step = int(str(error.value).split()[3].strip(","))
    assert checkpoint.newest(workdir / "run/checkpoints").step == step >= 2
    assert not list((workdir / "run/checkpoints").glob(".*"))


def test_a_signal_during_the_final_evaluation_stops_it_and_resuming_evaluates(workdir, monkeypatch, program):
    from polygpt.training import jobs

    nll, calls = jobs.Validation.run, []

    def interrupted(self, state, last):
        if last and not calls:
            calls.append(1)
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("the evaluation went on")
        nll(self, state, last)

    monkeypatch.setattr(jobs.Validation, "run", interrupted)
    with pytest.raises(Interrupted, match="after step 6, which is saved") as error:
        train(load_recipe("tiny.yaml"), "run", listeners=[RunFiles()])
    assert error.value.exit_code == 143
    assert not (workdir / "run/result.json").exists()
    assert program("train", "--resume", "--out", "run").code == 0
    assert json.loads((workdir / "run/result.json").read_text())["steps"] == 6


def test_a_signal_while_compiling_stops_before_the_first_step(workdir, monkeypatch):
    compile_step = Trainer.compile_step

    def interrupted(self, *arguments):
        signal.raise_signal(signal.SIGINT)
        return compile_step(self, *arguments)

    monkeypatch.setattr(Trainer, "compile_step", interrupted)
    events = []
    with pytest.raises(Interrupted, match="before the first step was saved; go on with") as error:
        train(load_recipe("tiny.yaml"), "run", listeners=[events.append])
    assert error.value.exit_code == 130
    assert not any(isinstance(event, Stepped) for event in events)


def test_work_that_changes_nothing_is_stopped_at_once():
    with InterruptFlag() as flag:
        with pytest.raises(Stop), flag.at_once():
            signal.raise_signal(signal.SIGTERM)
        assert flag.number == signal.SIGTERM
        with pytest.raises(Stop), flag.at_once():
            pytest.fail("a signal had come before")


class InterruptsAtItsEnd:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def test_a_second_interruption_that_a_finalizer_swallows_comes_again(monkeypatch):
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: lost.append(found.exc_type))

    def interrupted_twice():
        signal.raise_signal(signal.SIGINT)
        InterruptsAtItsEnd()
        time.sleep(10)

    with pytest.raises(KeyboardInterrupt), InterruptFlag():
        interrupted_twice()
    assert lost == [KeyboardInterrupt]


# Two interruptions while the background thread writes step 4: the second comes once the first has been noticed.
TWICE = """
import os, signal, threading, time
from polygpt import cli
from polygpt.checkpoint import steps
from polygpt.training.interrupt import InterruptFlag

write, handle, noticed = steps._write_json, InterruptFlag._handle, threading.Event()


def handle_and_note(*arguments):
    handle(*arguments)
    noticed.set()


def interrupt_twice():
    os.kill(os.getpid(), signal.SIGINT)
    noticed.wait()
    os.kill(os.getpid(), signal.SIGINT)


def slowly(path, value):
    if value.get("step") == 4 and path.name == "info.json":
        assert threading.current_thread() is not threading.main_thread()
        threading.Thread(target=interrupt_twice, daemon=True).start()
        time.sleep(300)
    write(path, value)


steps._write_json, InterruptFlag._handle = slowly, handle_and_note
cli.main(["train", "tiny.yaml", "training.steps=1000000", "--out", "run"])
"""


def test_a_second_ctrl_c_does_not_wait_for_a_step_that_is_being_saved(workdir):
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "polygpt: interrupted")
    assert checkpoint.newest(workdir / "run/checkpoints").step == 2
    with pytest.raises(Interrupted, match="after step 3, which is saved"):
        train(None, workdir / "run", resume=True, listeners=[interrupt_after_a_step])
    assert not list((workdir / "run/checkpoints").glob(".*")), "what was half written is gone"


def interrupt_after_a_step(event):
    if isinstance(event, Stepped):
        signal.raise_signal(signal.SIGINT)
