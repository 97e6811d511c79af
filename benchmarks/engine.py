"""The engine beside a static batch and beside one request after the other, and how soon a first token comes.

    python benchmarks/engine.py [--model FILE] [--slots 8] [--requests 32] [--rounds 3]

Requests have prompts of 16 to 512 tokens and 16 to 256 new ones, and arrive at random: before each step of the engine
with probability 1/4, once the slots are filled. A static batch takes as many requests as there are slots, in their
order, and ends with its longest. Rounds alternate; what counts is the ratio of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

import polygpt
from polygpt.generation import Engine, Request, Sampler, generate_tokens

SMALL = {
    "num_layers": 4,
    "embed_dim": 256,
    "attention.num_heads": 4,
    "context_length": 1024,
    "vocab_size": 8192,
}  # of the model that is made without --model


def requests_of(count: int, vocab: int) -> list[Request]:
    random = np.random.default_rng(0)
    found = []
    for seed in range(count):
        prompt, new = random.integers(16, 513), random.integers(16, 257)
        found.append(Request(random.integers(0, vocab, prompt).tolist(), int(new), Sampler(temperature=0.8), seed))
    return found


def through_the_engine(engine: Engine, requests: list[Request]) -> float:
    random, waiting = np.random.default_rng(1), list(requests)
    began = time.perf_counter()
    while waiting or not engine.idle:
        filled = len(requests) - len(waiting) >= engine.slots
        if waiting and (not filled or engine.idle or random.random() < 0.25):
            engine.submit(waiting.pop(0))
            continue
        engine.step()
    return time.perf_counter() - began


def in_batches(lm: polygpt.LanguageModel, requests: list[Request], size: int) -> float:
    began = time.perf_counter()
    for start in range(0, len(requests), size):
        for _ in generate_tokens(lm.model, lm.params, requests[start : start + size]):
            pass
    return time.perf_counter() - began


def first_token(engine: Engine) -> tuple[float, float]:
    """Seconds to the first token of a short prompt while all other slots decode, and seconds of a step before."""
    others = [engine.submit(Request([seed + 1] * 16, 200, Sampler(), seed)) for seed in range(engine.slots - 1)]
    while not all(other.tokens for other in others):
        engine.step()
    times = []
    for _ in range(9):
        began = time.perf_counter()
        engine.step(1)
        times.append(time.perf_counter() - began)
    handle, began = engine.submit(Request(np.arange(16).tolist(), 4, Sampler(), 99)), time.perf_counter()
    while not handle.tokens:
        engine.step()
    seconds = time.perf_counter() - began
    for other in [*others, handle]:
        other.cancel()
    engine.step()
    return seconds, statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a .gguf file; a small model of random weights without it")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", default="float32")
    arguments = parser.parse_args()
    if arguments.model:
        lm = polygpt.load(arguments.model, weights=arguments.weights)
    else:
        lm = polygpt.build(polygpt.preset("gpt2", **SMALL), seed=0)
        lm.pack(arguments.weights)
    requests = requests_of(arguments.requests, lm.config.vocab_size)
    engine = Engine(lm.model, lm.params, slots=arguments.slots, length=768, queue=len(requests), cache_bytes=0)
    engine.compile()
    # The first round compiles what the batches need; it does not count.
    tasks = {
        "engine": lambda: through_the_engine(engine, requests),
        "static": lambda: in_batches(lm, requests, arguments.slots),
        "sequential": lambda: in_batches(lm, requests, 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(arguments.rounds + 1):
        for name, task in tasks.items():
            seconds[name].append(task())
    tokens = sum(request.max_new_tokens for request in requests)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    waits = [first_token(engine) for _ in range(5)]
    result = {
        "tokens_per_second": {name: tokens / median for name, median in medians.items()},
        "engine_over_static": medians["static"] / medians["engine"],
        "engine_over_sequential": medians["sequential"] / medians["engine"],
        "first_token_in_steps": statistics.median(wait / step for wait, step in waits),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
