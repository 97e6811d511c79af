"""What the HTTP server costs beside its engine: tokens per second of many streams, processor time, cost of a request.

    python benchmarks/server.py --model FILE [--streams 32] [--new 32] [--length 1024] [--rounds 3]

The same requests (prompts of 32 tokens, --new tokens each) run once by stepping an engine, and once as streams over
loopback sockets, read by a process of its own; rounds alternate, and the ratio of medians counts. The fixed cost is the
median time of a request for one token, one after the other, beyond what the engine takes for it. The client's work is
part of both figures, since it shares the machine. With a model of 135 M parameters the fixed cost is lost in the noise
of half a second of computing: take it with a small one.

`cpu_ms_per_token` is processor time, all cores together, divided by the tokens of a round; it counts what requests cost
as a whole, so more with few tokens each:
    engine: the process while the engine is stepped.
    server: the process while it serves, less `engine`: the event loop, the wake-ups of the engine's thread, and the
        steps with few rows while the requests arrive one after the other.
    event_loop: its thread alone, which is the part of `server` that is measured exactly.
    client: the other process, which connects, reads with epoll and counts events, but parses nothing.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict

import numpy as np
import uvicorn

import polygpt
from polygpt.generation import Engine, Request, Sampler, TextStream
from polygpt.server import Served, ServerSettings, address_of, create_app, listen
from polygpt.server.launch import uvicorn_config

PROMPT = 32


def prompts_of(count: int, vocab: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return random.integers(100, vocab, (count, PROMPT)).tolist()


def body_of(prompt: list[int], new: int, bias: dict[str, float]) -> dict:
    return {"model": "m", "prompt": prompt, "max_tokens": new, "seed": 1, "logit_bias": bias, "stream": True}


# --- The client's process -------------------------------------------------------------------------------------


class Stream:
    """A request whose events are counted as they come, and not read otherwise."""

    def __init__(self, host: str, port: int, body: dict):
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        self.events, self.last = 0, b""
        self.socket = socket.create_connection((host, port))
        self.socket.sendall(f"{head}content-length: {len(data)}\r\nconnection: close\r\n\r\n".encode() + data)

    def receive(self) -> bool:
        """Takes what has come; False at the end."""
        piece = self.socket.recv(65536)
        if not piece:
            assert b"[DONE]" in self.last, self.last
            self.socket.close()
            return False
        self.events, self.last = self.events + piece.count(b"data: "), (self.last + piece)[-64:]
        return True


def read_all(streams: list[Stream]) -> int:
    """Reads streams to their ends, each as its data come; the number of events."""
    poll, left = select.epoll(), {}
    for stream in streams:
        left[stream.socket.fileno()] = stream
        poll.register(stream.socket, select.EPOLLIN)
    while left:
        for number, _ in poll.poll():
            if not left[number].receive():
                del left[number]
    return sum(stream.events for stream in streams)


def client() -> None:
    """Reads tasks from standard input, one a line: {host, port, bodies, together}; answers with {seconds, cpu, events}.

    `seconds` are of all if they are asked together, else of each.
    """
    for line in sys.stdin:
        task = json.loads(line)
        bodies, seconds, events, spent = task["bodies"], [], 0, time.process_time()
        for asked in [bodies] if task["together"] else [[body] for body in bodies]:
            began = time.perf_counter()
            events += read_all([Stream(task["host"], task["port"], body) for body in asked])
            seconds.append(time.perf_counter() - began)
        print(json.dumps({"seconds": seconds, "cpu": time.process_time() - spent, "events": events}), flush=True)


class Client:
    """The other process."""

    def __init__(self, address: str):
        self.host, _, port = address.removeprefix("http://").partition(":")
        self.port = int(port)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__, "--client"], **pipes)

    def run(self, bodies: list[dict], together: bool) -> dict:
        task = {"host": self.host, "port": self.port, "bodies": bodies, "together": together}
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


# --- The engine alone -----------------------------------------------------------------------------------------


def engine_seconds(lm: polygpt.LanguageModel, engine: Engine, prompts: list[list[int]], new: int, bias: dict) -> float:
    sampler = Sampler(logit_bias={int(token): value for token, value in bias.items()})
    began = time.perf_counter()
    for prompt in prompts:
        request = Request(prompt, new, sampler, 1, lm.stop_tokens)
        engine.submit(request, TextStream(lm.tokenizer.decode_after, prompt))
    while not engine.idle:
        engine.step()
    return time.perf_counter() - began


class Meter:
    """Processor seconds since it was made: of the whole process, and of one thread in it."""

    def __init__(self, thread: threading.Thread):
        self.clock = time.pthread_getcpuclockid(thread.ident)
        self.began = self._now()

    def read(self) -> tuple[float, float]:
        return tuple(now - began for now, began in zip(self._now(), self.began, strict=True))

    def _now(self) -> tuple[float, float]:
        return time.process_time(), time.clock_gettime(self.clock)


def measure(arguments: argparse.Namespace) -> dict:
    lm = polygpt.load(arguments.model, weights=arguments.weights)
    shape = {"slots": arguments.streams, "length": arguments.length, "cache_bytes": 0}
    settings = ServerSettings(port=0, queue=arguments.streams, **shape)
    served = Served("m", lm, settings)
    app, listening = create_app([served], settings), listen(settings)
    served.runner.compile()
    engine = Engine(lm.model, lm.params, **shape, vocab_size=lm.tokenizer.vocab_size)
    engine.compile()
    server = uvicorn.Server(uvicorn_config(app, settings))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)  # in the event loop of `serve`
    thread.start()
    other = Client(address_of(listening))
    bias = {str(token): -100.0 for token in lm.stop_tokens}
    prompts = prompts_of(arguments.streams, lm.tokenizer.vocab_size)
    bodies = [body_of(prompt, arguments.new, bias) for prompt in prompts]
    short = [body_of(prompt, 1, bias) for prompt in prompts[:16]]
    seconds = defaultdict(list)
    cpu = defaultdict(list)
    for _ in range(arguments.rounds + 1):  # the first warms up and does not count
        meter = Meter(thread)
        seconds["engine"].append(engine_seconds(lm, engine, prompts, arguments.new, bias))
        cpu["engine"].append(meter.read()[0])
        meter = Meter(thread)
        answer = other.run(bodies, together=True)
        whole, loop = meter.read()
        seconds["server"] += answer["seconds"]
        cpu["server"].append(whole)
        cpu["event_loop"].append(loop)
        cpu["client"].append(answer["cpu"])
        seconds["engine_one"].append(
            statistics.median(engine_seconds(lm, engine, [prompt], 1, bias) for prompt in prompts[:16])
        )
        seconds["server_one"].append(statistics.median(other.run(short, together=False)["seconds"]))
    other.process.stdin.close()
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    tokens = arguments.streams * arguments.new
    spent = {name: 1000 * statistics.median(times[1:]) / tokens for name, times in cpu.items()}
    spent["server"] -= spent["engine"]
    return {
        "tokens_per_second": {name: tokens / medians[name] for name in ("engine", "server")},
        "overhead": medians["server"] / medians["engine"] - 1,
        "cpu_ms_per_token": spent,
        "fixed_cost_ms": 1000 * (medians["server_one"] - medians["engine_one"]),
        "one_token_ms": {name: 1000 * medians[f"{name}_one"] for name in ("engine", "server")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a .gguf file with a tokenizer")
    parser.add_argument("--length", type=int, default=1024, help="tokens that a slot has room for")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        client()
        return
    print(json.dumps(measure(arguments), indent=1))


if __name__ == "__main__":
    main()
