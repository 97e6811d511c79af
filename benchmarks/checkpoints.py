"""A real checkpoint in polygpt and in transformers: loading, prefill, greedy decoding, HellaSwag, side by side.

    python benchmarks/checkpoints.py FOLDER [TASK...] [--dtype float32] [--weights int8] [--rounds 5] [--hellaswag FILE]

FOLDER is a Hugging Face folder that both open. Each framework lives in a process of its own; rounds alternate between
them, task by task, and what counts is the ratio of medians. Tasks:

    prefill           512 tokens
    decode1, decode8  128 tokens greedily, from 16, in batches of 1 and 8
    hellaswag         rows
    load              model and tokenizer
    touch             the same, and every weight is read once (transformers maps the file and reads it when it is used)

Peak memory is that before the last two, which hold the model a second time. Both frameworks compute on a GPU where they
find one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

TASKS = ("prefill", "decode1", "decode8", "hellaswag", "load", "touch")
LENGTH, PROMPT, NEW, ROWS = 512, 16, 128, 200
AMOUNT = {"load": 1, "touch": 1, "prefill": LENGTH, "decode1": NEW, "decode8": 8 * NEW, "hellaswag": ROWS}
WEIGHTS = ("float32", "bfloat16", "float16", "int8", "int4")


class Worker:
    """One framework's process; each line it reads is a task, each it writes the seconds that took."""

    def __init__(self, framework: str, arguments: argparse.Namespace):
        words = [sys.executable, __file__, arguments.folder, "--worker", framework, "--dtype", arguments.dtype]
        words += ["--hellaswag", arguments.hellaswag] if arguments.hellaswag else []
        words += ["--weights", arguments.weights] if arguments.weights else []
        # JAX would otherwise take most of a GPU's memory at once, beside torch.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.times: dict[str, list[float]] = {}
        self.peak = 0

    def round(self, task: str) -> None:
        answer = self.ask(task)
        self.times.setdefault(task, []).append(answer["seconds"])
        if task not in ("load", "touch"):
            self.peak = answer["peak_bytes"]

    def ask(self, task: str) -> dict:
        self.process.stdin.write(f"{task}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a worker failed: {' '.join(self.process.args)}")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--weights", choices=WEIGHTS, help="type of polygpt's packed weights; as --dtype if left out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hellaswag", metavar="FILE", help="rows in the cleaned format")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    if arguments.worker:
        serve(arguments)
        return
    tasks = arguments.tasks or [task for task in TASKS if task != "hellaswag" or arguments.hellaswag]
    workers = {framework: Worker(framework, arguments) for framework in ("polygpt", "transformers")}
    for task in tasks:
        for worker in workers.values():  # once for compilation and for the page cache
            worker.ask(task)
        for _ in range(arguments.rounds):
            for worker in workers.values():
                worker.round(task)
    bandwidth = statistics.median(workers["polygpt"].ask("bandwidth")["seconds"] for _ in range(arguments.rounds))
    result = {"folder": Path(arguments.folder).name, "dtype": arguments.dtype, "rounds": arguments.rounds}
    result["weights"] = arguments.weights or arguments.dtype
    result["gigabytes_per_second"] = BANDWIDTH_BYTES / bandwidth / 1e9
    for name, worker in workers.items():
        result[f"{name}_peak_bytes"] = worker.peak
    for task in tasks:
        ours, theirs = (statistics.median(worker.times[task]) for worker in workers.values())
        unit = AMOUNT[task]
        result[task] = {"polygpt": unit / ours, "transformers": unit / theirs, "ratio": theirs / ours}
    if arguments.json:
        print(json.dumps(result))
        return
    types = f"{arguments.dtype}, weights {result['weights']}"
    print(f"{result['folder']}, {types}; memory gives {result['gigabytes_per_second']:.1f} GB/s")
    for task in tasks:
        row = result[task]
        print(f"{task:10} {row['polygpt']:10.2f} {row['transformers']:10.2f} a second  {row['ratio']:5.2f}x")
    print("peak", *(f"{name} {worker.peak / 1e6:,.0f} MB" for name, worker in workers.items()))


BANDWIDTH_BYTES = 1 << 29


def serve(arguments: argparse.Namespace) -> None:
    """Answers tasks until standard input ends."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; standard output is for times alone
    tasks, peak = (polygpt_tasks if arguments.worker == "polygpt" else transformers_tasks)(arguments)
    for line in sys.stdin:
        task = tasks[line.strip()]
        before = time.perf_counter()
        task()
        seconds = time.perf_counter() - before
        print(json.dumps({"seconds": seconds, "peak_bytes": peak()}), file=reply, flush=True)


def peak_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prompts(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1000, 40000, (rows, length)).astype(np.int32)


class Tasks(NamedTuple):
    """What each task runs, and the peak of memory in bytes, a GPU's where there is one."""

    run: dict[str, Callable[[], object]]
    peak: Callable[[], int]


def polygpt_tasks(arguments: argparse.Namespace) -> Tasks:
    from polygpt.process import keep_freed_memory

    keep_freed_memory()  # as the command does
    import jax
    import jax.numpy as jnp

    import polygpt
    from polygpt.generation import Request, Sampler, engine_for, run_all

    def load() -> None:
        jax.block_until_ready(polygpt.load(arguments.folder, dtype=arguments.dtype, weights=weights).params)

    weights = arguments.weights or arguments.dtype  # packed, as the commands do
    lm = polygpt.load(arguments.folder, dtype=arguments.dtype, weights=weights)
    last = jax.jit(lambda params, tokens: lm.model.module(params).logits(lm.model.hidden(params, tokens).hidden[:, -1]))

    def decode(rows: int) -> None:
        requests = [Request(prompt, NEW, Sampler(temperature=0)) for prompt in prompts(rows, PROMPT).tolist()]
        run_all(engine_for(lm.model, lm.params, requests), requests)

    def hellaswag() -> None:
        from polygpt.evaluation import choose_endings, encode_questions, read_questions

        path = Path(arguments.hellaswag)
        questions = read_questions(path)[:ROWS]
        pairs = encode_questions(questions, lm.tokenizer, lm.config.context_length, path)
        choose_endings(lm, questions, pairs)

    numbers: list = []

    def bandwidth() -> None:
        if not numbers:  # at first use: memory of its own counts in no peak
            numbers.append(jnp.ones((64, BANDWIDTH_BYTES // 256), jnp.float32))
        jax.block_until_ready(largest(numbers[0]))

    def peak() -> int:
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or peak_of_process()

    largest = jax.jit(lambda x: x.max(1))
    tasks = {
        "load": load,
        "touch": load,
        "prefill": lambda: jax.block_until_ready(last(lm.params, prompts(1, LENGTH))),
        "decode1": lambda: decode(1),
        "decode8": lambda: decode(8),
        "hellaswag": hellaswag,
        "bandwidth": bandwidth,
    }
    return Tasks(tasks, peak)


def transformers_tasks(arguments: argparse.Namespace) -> Tasks:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    torch.backends.cuda.matmul.allow_tf32 = True  # as JAX does
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = getattr(torch, arguments.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load():
        AutoTokenizer.from_pretrained(arguments.folder)
        model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=dtype).eval().to(device)
        wait()
        return model

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if device == "cuda" else peak_of_process()

    model = load()

    def touch() -> None:
        with torch.no_grad():
            for parameter in load().parameters():
                parameter.max()
        wait()

    @torch.no_grad()
    def prefill() -> None:
        model(torch.from_numpy(prompts(1, LENGTH)).long().to(device), logits_to_keep=1)
        wait()

    @torch.no_grad()
    def decode(rows: int) -> None:
        tokens = torch.from_numpy(prompts(rows, PROMPT)).long().to(device)
        mask = torch.ones_like(tokens)
        settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        model.generate(tokens, attention_mask=mask, **settings)
        wait()

    @torch.no_grad()
    def hellaswag() -> None:
        """As lm-evaluation-harness does: every context with every ending, by length, in batches of 16."""
        tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
        rows = []
        with open(arguments.hellaswag, encoding="utf-8") as file:
            for line in list(file)[:ROWS]:
                row = json.loads(line)
                context = f"{row['activity_label']}: {row['ctx']}"
                for ending in row["endings"]:
                    ids = tokenizer(f"{context} {ending}").input_ids
                    rows.append((ids, len(ids) - len(tokenizer(context).input_ids)))
        rows.sort(key=lambda row: -len(row[0]))
        for start in range(0, len(rows), 16):
            group = rows[start : start + 16]
            width = len(group[0][0])
            tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in group])
            scores = torch.log_softmax(model(tokens.to(device)).logits.float(), -1)
            for i, (ids, count) in enumerate(group):
                at = range(len(ids) - count - 1, len(ids) - 1)
                scores[i, list(at), ids[-count:]].sum().item()

    tasks = {
        "load": load,
        "touch": touch,
        "prefill": prefill,
        "decode1": lambda: decode(1),
        "decode8": lambda: decode(8),
        "hellaswag": hellaswag,
    }
    return Tasks(tasks, peak)


if __name__ == "__main__":
    main()
