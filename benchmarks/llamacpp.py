"""A model in polygpt and in llama.cpp at equal bits: prefill, decoding one row and eight requests at once.

    python benchmarks/llamacpp.py MODEL [TASK...] [--pairs int8=Q8_0 int4=Q4_1] [--rounds 5] [--python FILE]

MODEL is whatever `polygpt.load` opens. It is exported as GGUF in float32, and llama.cpp quantizes that file itself, by
its own defaults for the type. `--python` is an interpreter that has llama-cpp-python, if this one does not. Each pair
of types has a process for each engine; rounds alternate between them, task by task, and what counts is the ratio of
medians. Tasks:

    prefill           a prompt of 512 tokens, and one token after it
    decode1, decode8  128 tokens greedily, from 16: one request, or eight at once (in llama.cpp a batch of 8 sequences)
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

TASKS = {"prefill": (1, 512, 1), "decode1": (1, 16, 128), "decode8": (8, 16, 128)}  # rows, prompt, new tokens
THREADS = 2


class Worker:
    """One engine's process; each line it reads is a task, each it writes the seconds that took."""

    def __init__(self, python: str, engine: str, model: str, kind: str):
        words = [python, __file__, model, "--worker", engine, "--pairs", kind]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, task: str) -> float:
        self.process.stdin.write(f"{task}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a worker failed: {' '.join(self.process.args)}")
        return json.loads(line)["seconds"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("tasks", nargs="*", metavar="TASK", choices=[*TASKS, []])
    parser.add_argument("--pairs", nargs="+", default=["int8=Q8_0", "int4=Q4_1"], metavar="OURS=THEIRS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="has llama-cpp-python")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    if arguments.worker:
        make = polygpt_task if arguments.worker == "polygpt" else llama_task
        serve(make(arguments.model, arguments.pairs[0]))
        return
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "model.gguf"
        export(arguments.model, exported)
        for pair in arguments.pairs:
            ours, theirs = pair.split("=")
            workers = (
                Worker(sys.executable, "polygpt", arguments.model, ours),
                Worker(arguments.python, "llama.cpp", str(exported), theirs),
            )
            for task in arguments.tasks or TASKS:
                print(json.dumps(compare(workers, task, arguments.rounds, pair)), flush=True)
            for worker in workers:
                worker.close()


def compare(workers: tuple[Worker, Worker], task: str, rounds: int, pair: str) -> dict:
    """Tokens a second of both engines, alternating; what a first round compiles does not count."""
    for worker in workers:
        worker.seconds(task)
    times = [[worker.seconds(task) for worker in workers] for _ in range(rounds)]
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = sorted(b / a for a, b in times)
    rows, prompt, new = TASKS[task]
    tokens = prompt if new == 1 else rows * new
    row = {"task": task, "types": pair, "polygpt": tokens / ours, "llama.cpp": tokens / theirs}
    return row | {"ratio": theirs / ours, "of_a_round": [ratios[0], ratios[-1]]}


def export(model: str, path: Path) -> None:
    import polygpt
    from polygpt.interop import export_gguf

    lm = polygpt.load(model, dtype="float32")
    export_gguf(path, lm.config, lm.params, lm.tokenizer if lm.has_tokenizer else None)


def serve(run: Callable[[str], None]) -> None:
    """Answers tasks until standard input ends."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; standard output is for times alone
    for line in sys.stdin:
        before = time.perf_counter()
        run(line.strip())
        print(json.dumps({"seconds": time.perf_counter() - before}), file=reply, flush=True)


def prompts(rows: int, length: int, vocab: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, vocab, (rows, length)).tolist()


def polygpt_task(model: str, weights: str) -> Callable[[str], None]:
    from polygpt.process import keep_freed_memory

    keep_freed_memory()  # as the command does
    import polygpt
    from polygpt.generation import Request, Sampler, engine_for, run_all

    lm = polygpt.load(model, dtype="float32", weights=weights)

    def run(task: str) -> None:
        rows, prompt, new = TASKS[task]
        requests = [
            Request(ids, new, Sampler(temperature=0.0), stop_tokens=())
            for ids in prompts(rows, prompt, lm.config.vocab_size)
        ]
        run_all(engine_for(lm.model, lm.params, requests), requests)

    return run


def llama_task(exported: str, kind: str) -> Callable[[str], None]:
    import llama_cpp as llama

    silent = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    quantized = Path(exported).with_name(f"{kind}.gguf")
    settings = llama.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}"), THREADS
    if llama.llama_model_quantize(exported.encode(), str(quantized).encode(), ctypes.byref(settings)):
        sys.exit(f"llama.cpp cannot quantize {exported} to {kind}")
    model = llama.llama_model_load_from_file(str(quantized).encode(), llama.llama_model_default_params())
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    contexts = {}

    def context_of(rows: int, tokens: int):
        """Made once, and emptied for each run; `silent` has to live as long as it."""
        if (rows, tokens) not in contexts:
            own = llama.llama_context_default_params()
            own.n_seq_max, own.n_ctx, own.n_batch, own.n_ubatch = rows, rows * 256 * -(-tokens // 256), 512, 512
            own.n_threads = own.n_threads_batch = THREADS
            contexts[rows, tokens] = llama.llama_init_from_model(model, own), llama.llama_batch_init(512, 0, 1), silent
        context, batch, _ = contexts[rows, tokens]
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        return context, batch

    def run(task: str) -> None:
        rows, prompt, new = TASKS[task]
        context, batch = context_of(rows, prompt + new)
        tokens, first = prompts(rows, prompt, vocab), 0
        for _ in range(new):
            ends = fill(batch, tokens, first)
            if llama.llama_decode(context, batch):
                sys.exit("llama.cpp failed to decode")
            first += len(tokens[0])
            tokens = [[likeliest(llama.llama_get_logits_ith(context, end), vocab)] for end in ends]

    return run


def fill(batch, tokens: list[list[int]], first: int) -> list[int]:
    """Puts each row's tokens at positions from `first` on; returns where the rows' last ones stand in the batch."""
    at, ends = 0, []
    for sequence, row in enumerate(tokens):
        for offset, token in enumerate(row):
            batch.token[at], batch.pos[at] = token, first + offset
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.logits[at] = offset == len(row) - 1
            at += 1
        ends.append(at - 1)
    batch.n_tokens = at
    return ends


def likeliest(logits, vocab: int) -> int:
    return int(np.ctypeslib.as_array(logits, (vocab,)).argmax())


if __name__ == "__main__":
    main()
