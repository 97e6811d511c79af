"""`polygpt serve` as a process: what it says, what it refuses, and how it ends."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import openai
import pytest
import serving
from foreign import with_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = with_tokenizer(tmp_path_factory.mktemp("serve") / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16_000}))
    return folder


@contextlib.contextmanager
def started(*words):
    """A server as a process, once it listens."""
    command = [sys.executable, "-m", "polygpt", "serve", *map(str, words), "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        told = json.loads(process.stdout.readline() or "null")
        assert told is not None, process.stderr.read()
        yield process, told["url"]
    finally:
        process.kill()
        process.communicate()


def begin(url, **changes):
    """A long stream under way."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    bias = {"2": -100}
    body = {"model": "tiny", "prompt": "the", "max_tokens": 15_000, "stream": True, "logit_bias": bias, **changes}
    connection.sendall(serving.post("/v1/completions", body))
    received = b""
    while received.count(b"data: ") < 2:
        received += connection.recv(4096)
    return connection


def first_refusal(client):
    """How the server refuses, once it has handled the signal."""
    for _ in range(500):
        try:
            client.models.list()
        except openai.APIStatusError as error:
            return error
        time.sleep(0.01)
    raise AssertionError("the server went on")


def rest_of(connection):
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            received += piece
    return received


def test_sigterm_refuses_new_requests_finishes_running_ones_and_exits_with_0(folder):
    with started(folder, "--slots", 2, "--shutdown-seconds", 120) as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        assert client.completions.create(model="tiny", prompt="the", max_tokens=3).choices
        running = begin(url, max_tokens=500)
        process.send_signal(signal.SIGTERM)
        refused = first_refusal(client)
        assert (refused.status_code, refused.code) == (503, "shutting_down")
        assert b"data: [DONE]" in rest_of(running)
        assert process.wait(120) == 0
        log = [json.loads(line) for line in process.stderr.read().splitlines() if line.startswith("{")]
        assert [line["status"] for line in log if "status" in line].count(503) == 1


def test_a_time_limit_or_a_second_signal_cuts_what_runs(folder):
    with started(folder, "--slots", 2, "--shutdown-seconds", 0.5) as (process, url):
        running = begin(url)
        process.send_signal(signal.SIGTERM)
        cut = rest_of(running)
        assert b"shutting_down" in cut
        assert b"[DONE]" not in cut
        assert process.wait(30) == 0
    with started(folder, "--slots", 2) as (process, url):
        running = begin(url)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert b"shutting_down" in rest_of(running)
        assert process.wait(30) == 130


def refused(program, *words):
    """The complaint of a command that ends with 2."""
    done = program("serve", *words)
    assert done.code == 2, done.err
    return " ".join(done.complaint)


def test_what_cannot_be_served_is_said_before_anything_is_loaded(program, folder, tmp_path):
    keys = tmp_path / "keys"
    assert "--api-key-file" in refused(program, folder, "--host", "0.0.0.0")
    wrong = {"": "no API key", "short": "at least 16", "with a blank in it all": "printable", "é" * 20: "ASCII"}
    for text, said in wrong.items():
        keys.write_text(text)
        assert said in refused(program, folder, "--api-key-file", keys)
    keys.write_bytes(b"\xff" * 20)
    assert "UTF-8" in refused(program, folder, "--api-key-file", keys)
    assert "--served-name" in refused(program, folder, folder)
    assert "for 1" in refused(program, folder, "--served-name", "a", "--served-name", "b")
    assert "printable" in refused(program, folder, "--served-name", "a\n")
    assert "no tokenizer" in refused(program, "tiny_moe", "--port", 0)
    assert "did you mean 'max_n'" in refused(program, folder, "--limit", "max_m=3")
    assert "max_n" in refused(program, folder, "--limit", "max_n=0")
    assert "deadline_seconds" in refused(program, folder, "--deadline", -1)


def test_a_port_in_use_is_said(program, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = program("serve", folder, "--port", taken.getsockname()[1])
    assert done.code == 1
    assert "cannot listen on 127.0.0.1" in done.complaint[0]


def test_a_missing_extra_is_named(folder):
    without = "import sys; sys.modules['uvicorn'] = None; from polygpt.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", without, "serve", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "pip install 'polygpt[serve]'" in done.stderr
