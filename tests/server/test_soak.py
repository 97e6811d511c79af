"""Hours of misuse in two minutes: memory stays flat, no slot is lost, every answer is the engine's."""

import contextlib
import gc
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import serving

pytestmark = pytest.mark.slow

PROMPTS = ["the cat", "sat on", "the mat, é", "x y z", "on the mat the cat sat"]
SEEDS, NEW = 10, 24


def resident():
    """Megabytes of this process."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@pytest.fixture(scope="module")
def expected(lm):
    return {
        (prompt, seed): lm.generate(prompt, max_new_tokens=NEW, seed=seed, temperature=1.0).text
        for prompt in PROMPTS
        for seed in range(SEEDS)
    }


def body_for(prompt, seed, stream):
    return {"model": "tiny", "prompt": prompt, "seed": seed, "max_tokens": NEW, "stream": stream}


def read_all(connection, pause=0.0, size=65536):
    """A response to its end; one that is chunked or of known length."""
    received = b""
    while True:
        time.sleep(pause)
        piece = connection.recv(size)
        received += piece
        head, found, rest = received.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if not piece or (found and (len(rest) >= int(length) if length else rest.endswith(b"0\r\n\r\n"))):
            return received


def text_of(raw):
    """Status and text of an answer, whole or streamed."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    code = int(head.split()[1])
    if code != 200:
        return code, None
    if b"text/event-stream" not in head:
        return code, json.loads(rest)["choices"][0]["text"]
    plain = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        plain, rest = plain + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    events = [line[6:] for line in plain.decode().splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return code, "".join(json.loads(event)["choices"][0]["text"] for event in events)


def ask(live, prompt, seed, stream):
    connection = live.connect("/v1/completions", body_for(prompt, seed, stream))
    with contextlib.closing(connection):
        return text_of(read_all(connection))


def test_a_thousand_requests_with_a_hundred_disconnects(lm, expected):
    draw = random.Random(0)
    tasks = [(draw.choice(PROMPTS), draw.randrange(SEEDS), draw.random() < 0.5) for _ in range(1000)]
    leavers = set(draw.sample(range(1000), 100))

    def run(number):
        prompt, seed, stream = tasks[number]
        if number not in leavers:
            return ask(live, prompt, seed, stream)
        connection = live.connect("/v1/completions", body_for(prompt, seed, stream) | {"max_tokens": 900})
        time.sleep(random.Random(number).random() * 0.1)
        connection.close()
        return None

    with serving.running({"tiny": lm}, slots=8, queue=64) as live, ThreadPoolExecutor(24) as pool:
        list(pool.map(run, range(300)))
        live.until(lambda: live.idle)
        before = resident()
        for start in (0, 300, 600):
            found = list(pool.map(run, range(start, min(start + 400, 1000))))
            for number, answer in enumerate(found, start):
                if number not in leavers:
                    assert answer == (200, expected[tasks[number][:2]])
            live.until(lambda: live.idle)
        assert resident() < 1.05 * before
        assert live.served.runner._live == {}
        assert live.served.runner.jobs == set()
        assert live.served.runner.restarts == 0


def test_two_hundred_at_once_against_a_queue_of_sixteen(lm, expected):
    answers, start = [], threading.Barrier(200)

    def run(number):
        prompt, seed = PROMPTS[number % len(PROMPTS)], number % SEEDS
        with socket.create_connection(live.address, timeout=60) as connection:
            start.wait(60)
            connection.sendall(serving.post("/v1/completions", body_for(prompt, seed, number % 2 == 0)))
            answers.append(((prompt, seed), text_of(read_all(connection))))

    with serving.running({"tiny": lm}, slots=4, queue=16) as live:
        ask(live, "the cat", 0, False)
        threads = [threading.Thread(target=run, args=(number,)) for number in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert len(answers) == 200
        assert {code for _, (code, _) in answers} == {200, 429}
        taken = [(asked, text) for asked, (code, text) in answers if code == 200]
        assert len(taken) >= 20
        assert all(text == expected[asked] for asked, text in taken)
        live.until(lambda: live.idle)


def test_a_minute_of_clients_that_read_slowly(lm):
    bias = {str(token): -100 for token in lm.stop_tokens}
    asked = {"model": "tiny", "prompt": "x", "max_tokens": 900, "logprobs": 20, "stream": True, "logit_bias": bias}
    ends, measured = time.monotonic() + 60, []

    def crawl(seed):
        while time.monotonic() < ends:
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(600)
            connection.connect(live.address)
            connection.sendall(serving.post("/v1/completions", asked | {"seed": seed}))
            stops = time.monotonic() + 4
            with contextlib.closing(connection):
                while time.monotonic() < min(stops, ends) and connection.recv(2048):
                    time.sleep(0.02)

    with serving.running({"tiny": lm}, slots=8, queue=64, idle_seconds=5.0) as live:
        threads = [threading.Thread(target=crawl, args=(seed,)) for seed in range(12)]
        for thread in threads:
            thread.start()
        while time.monotonic() < ends:
            time.sleep(5)
            measured.append(resident())
        for thread in threads:
            thread.join(60)
        live.until(lambda: live.idle, 60)
        assert max(measured[4:]) < 1.05 * max(measured[:4])
        assert ask(live, "the cat", 0, False)[0] == 200
