"""The engine beside a static batch and one request after the other; first tokens, constraints and speculation.

    python benchmarks/engine.py [--model FILE] [--weights float32] [TASK...]

Tasks; without any all are run:
    throughput  32 requests (prompts of 16 to 512 tokens, 16 to 256 new ones, arriving at random: before each step with
                probability 1/4, once the slots are filled) through 8 slots; in static batches of 8, each
                as long as its longest; and one after the other. --only leaves the others out, --requests N takes fewer.
    first       steps to the first token of a prompt of 16 tokens while 7 other requests decode.
    masks       8 rows with and without a JSON schema.
    lookup      text that repeats its prompt, and text that does not, with prompt look-up and without.

Runs alternate; what counts is the ratio of medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import polygpt
from polygpt.generation import Constraint, Engine, Request, Sampler, Vocabulary, as_grammar
from polygpt.process import keep_freed_memory

SMALL = {
    "num_layers": 4,
    "embed_dim": 256,
    "attention.num_heads": 4,
    "context_length": 1024,
    "vocab_size": 8192,
}  # of the model that is made without --model
SLOTS, LENGTH = 8, 768
GREEDY = Sampler(temperature=0.0)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "size": {"type": "object", "properties": {"width": {"type": "number"}, "height": {"type": "number"}}},
    },
    "required": ["name", "tags", "size"],
}


def requests_of(count: int, vocab: int) -> list[Request]:
    random = np.random.default_rng(0)
    found = []
    for seed in range(count):
        prompt, new = random.integers(16, 513), random.integers(16, 257)
        found.append(Request(random.integers(0, vocab, prompt).tolist(), int(new), Sampler(temperature=0.8), seed))
    return found


class StaticBatch:
    """Prompts padded to one length, read in one pass, then decoded until all have ended: what an engine replaces."""

    def __init__(self, lm: polygpt.LanguageModel):
        self.lm = lm

        def run(params: dict, tokens: jax.Array, lengths: jax.Array, steps: jax.Array, key: jax.Array) -> jax.Array:
            decoder = lm.model.module(params)
            state = lm.model.init_state(len(tokens), LENGTH)
            output = decoder(tokens, state=state, valid=jnp.arange(tokens.shape[1]) < lengths[:, None], fresh=True)
            last = jnp.take_along_axis(output.hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]

            def sample(hidden: jax.Array, step: jax.Array) -> jax.Array:
                return jax.random.categorical(jax.random.fold_in(key, step), decoder.logits(hidden) / 0.8)

            def step(index: jax.Array, carry: tuple) -> tuple:
                token, state = carry
                output = decoder(token[:, None], positions=(lengths + index)[:, None], state=state)
                return sample(output.hidden[:, 0], index + 1), output.state

            return lax.fori_loop(0, steps - 1, step, (sample(last, jnp.int32(0)), output.state))[0]

        self._run = jax.jit(run)

    def __call__(self, requests: Sequence[Request]) -> None:
        longest = max(len(request.prompt) for request in requests)
        tokens = np.zeros((len(requests), -(-longest // 128) * 128), np.int32)
        for row, request in zip(tokens, requests, strict=True):
            row[: len(request.prompt)] = request.prompt
        lengths = np.array([len(request.prompt) for request in requests], np.int32)
        steps = np.int32(max(request.max_new_tokens for request in requests))
        jax.block_until_ready(self._run(self.lm.params, tokens, lengths, steps, jax.random.key(0)))


def timed(task: Callable[[], object]) -> float:
    began = time.perf_counter()
    task()
    return time.perf_counter() - began


def alternate(tasks: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each; what a first round compiles does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            took = timed(task)
            if number:
                seconds[name].append(took)
    return {name: statistics.median(times) for name, times in seconds.items()}


def engine_of(lm: polygpt.LanguageModel, slots: int = SLOTS, **settings: object) -> Engine:
    engine = Engine(lm.model, lm.params, slots=slots, length=LENGTH, cache_bytes=0, queue=64, **settings)
    engine.compile()
    return engine


def run(engine: Engine, requests: Sequence[Request]) -> list[int]:
    handles = [engine.submit(request) for request in requests]
    return [len(handle.result().tokens) for handle in handles]


def throughput(lm: polygpt.LanguageModel, arguments: argparse.Namespace) -> dict:
    requests = requests_of(arguments.requests, lm.config.vocab_size)
    engine, batch = engine_of(lm), StaticBatch(lm)
    one = engine_of(lm, 1) if "sequential" in arguments.only else engine

    def through_the_engine() -> None:
        random, waiting = np.random.default_rng(1), list(requests)
        while waiting or not engine.idle:
            filled = len(requests) - len(waiting) >= engine.slots
            if waiting and (not filled or engine.idle or random.random() < 0.25):
                engine.submit(waiting.pop(0))
                continue
            engine.step()

    def in_batches() -> None:
        for start in range(0, len(requests), SLOTS):
            batch(requests[start : start + SLOTS])

    def one_by_one() -> None:
        for request in requests:
            run(one, [request])

    tasks = {"engine": through_the_engine, "static": in_batches, "sequential": one_by_one}
    chosen = {name: tasks[name] for name in arguments.only.split(",")}
    run(engine, requests[:1])  # compiles
    if "static" in chosen:
        for start in range(0, len(requests), SLOTS):
            batch([dataclasses.replace(each, max_new_tokens=1) for each in requests[start : start + SLOTS]])
    if "sequential" in chosen:
        run(one, requests[:1])
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(arguments.rounds):
        for name, task in chosen.items():
            seconds[name].append(timed(task))
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    tokens = sum(request.max_new_tokens for request in requests)
    return {name: tokens / statistics.median(times) for name, times in seconds.items()}


def first(lm: polygpt.LanguageModel, arguments: argparse.Namespace) -> dict:
    engine, counts = engine_of(lm), []
    for _ in range(arguments.rounds + 2):
        others = [engine.submit(Request([seed + 1] * 16, 200, Sampler(), seed)) for seed in range(SLOTS - 1)]
        while not all(other.tokens for other in others):
            engine.step()
        step = statistics.median(timed(lambda: engine.step(1)) for _ in range(9))
        handle, began = engine.submit(Request(list(range(16)), 4, Sampler(), 99)), time.perf_counter()
        while not handle.tokens:
            engine.step()
        counts.append((time.perf_counter() - began) / step)
        for other in [*others, handle]:
            other.cancel()
        engine.step()
    return {"steps_to_first_token": statistics.median(counts)}


def masks(lm: polygpt.LanguageModel, arguments: argparse.Namespace) -> dict:
    """Penalised characters, so that a schema's strings go on for as long as its neighbours' text."""
    engine = engine_of(lm)
    if lm.has_tokenizer:
        constraint = lm.constraint(schema=SCHEMA)
    else:
        size = lm.config.vocab_size
        words = Vocabulary(
            [f'{number:x}"{{}}:,[] '[number % 9 :][:3].encode() for number in range(size)], [], None, list
        )
        constraint = Constraint(words, as_grammar(schema=SCHEMA))
    plain = [Request([5, 6, 7], 64, Sampler(), seed) for seed in range(SLOTS)]
    kept = [Request([5, 6, 7], 64, Sampler(), seed, constraint=constraint) for seed in range(SLOTS)]

    def steps(requests: list[Request]) -> list[float]:
        """Seconds of each step in which all slots decoded."""
        handles = [engine.submit(request) for request in requests]
        while any(not handle.tokens for handle in handles):
            engine.step(1)
        times = []
        while not any(handle.ended for handle in handles):
            before = engine.statistics
            took = timed(lambda: engine.step(1))
            if engine.statistics.tokens - before.tokens == SLOTS:  # nothing was forced
                times.append(took)
        for handle in handles:
            handle.cancel()
        engine.step()
        return times

    found: dict[str, list[float]] = {"plain": [], "schema": []}
    for number in range(arguments.rounds + 2):
        for name, requests in (("plain", plain), ("schema", kept)):
            times = steps(requests)
            found[name] += times if number else []
    medians = {name: statistics.median(times) for name, times in found.items()}
    matcher = kept[0]
    handle = engine.submit(matcher)
    words = engine._runner.all_allowed().shape[1]
    own = statistics.median(timed(lambda: handle.matcher.allowed(words)) for _ in range(50))
    handle.cancel()
    return {"seconds_a_step": medians, "cost": medians["schema"] / medians["plain"] - 1, "seconds_a_mask": own}


def lookup(lm: polygpt.LanguageModel, arguments: argparse.Namespace) -> dict:
    """Copying: a sampler that is made to repeat a passage; never helping: random tokens at a high temperature."""
    plain, guessing = engine_of(lm, 1), engine_of(lm, 1, draft="lookup")
    passage = np.random.default_rng(3).integers(0, lm.config.vocab_size, 40).tolist()
    copying = Request(passage * 3, 96, GREEDY)
    random = Request(passage * 3, 96, Sampler(temperature=3.0), 1)
    result = {}
    for name, request in (("copying", copying), ("random", random)):
        own = plain.submit(request).result()
        handle = guessing.submit(request).result()
        assert handle.tokens == own.tokens, "speculation changed the ids"
        tasks = {"plain": lambda r=request: run(plain, [r]), "lookup": lambda r=request: run(guessing, [r])}
        seconds = alternate(tasks, arguments.rounds)
        share = handle.accepted / handle.drafted if handle.drafted else None
        result[name] = {"speedup": seconds["plain"] / seconds["lookup"], "acceptance": share}
    return result


TASKS = {"throughput": throughput, "first": first, "masks": masks, "lookup": lookup}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], metavar="TASK")
    parser.add_argument("--model", help="a folder or a .gguf file; a small model of random weights without it")
    parser.add_argument("--weights", default="float32")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="engine,static,sequential")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command does
    if arguments.model:
        lm = polygpt.load(arguments.model, weights=arguments.weights)
    else:
        lm = polygpt.build(polygpt.preset("gpt2", **SMALL), seed=0)
        lm.pack(arguments.weights)
    for name in arguments.tasks or TASKS:
        print(json.dumps({name: TASKS[name](lm, arguments)}), flush=True)


if __name__ == "__main__":
    main()
