"""How fast text becomes shards, and shards become batches.

    python benchmarks/data.py [prepare] [workers] [loader] [shards] [--rounds 7] [--megabytes 32] [--tokenizer FILE]

    prepare  tokens per second on one core: `prepare_in_parallel` (reading, splitting, encoding, writing, checksums)
             beside the tokenizer library encoding the same texts from memory; goal 0.9
    workers  two workers on two cores beside one on one core; goal 1.7
    loader   a batch of the recipe `demo` beside its training step; goal 1 %
    shards   tokens per second of shuffled batches on one core, from shards of 10 billion tokens in sparse files;
             goal 5 million

What is compared takes turns in one process, which `prepare` and `shards` pin to one core. The text is Python's
documentation and standard library, repeated with a number before each document. Without --tokenizer a BPE of 8,192 ids
is trained on it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, cycle
from pathlib import Path

import numpy as np

TASKS = ("prepare", "workers", "loader", "shards")
CORES = sorted(os.sched_getaffinity(0))
DOCUMENTS = 1000  # that the library encodes at once
SHARD_TOKENS, SHARDS = 100_000_000, 100
CONTEXT, BATCH = 1024, 64  # of `shards`


def write_text(path: Path, megabytes: int) -> list[str]:
    """Writes a .jsonl file of about so many megabytes; returns its texts."""
    from polygpt.data import DataConfig, open_source

    own = [document.text for document in open_source(DataConfig())]
    texts, size = [], 0
    for number, text in enumerate(cycle(own)):
        if size >= megabytes << 20:
            break
        texts.append(f"{number}\n{text}")  # no two alike
        size += len(text)
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return texts


def tokenizer_of(name: str | None, texts: list[str]):
    """The named tokenizer, or a BPE trained on the first texts."""
    from polygpt.tokenizers import TokenizerConfig, load_tokenizer, train_tokenizer

    return load_tokenizer(name) if name else train_tokenizer(TokenizerConfig(vocab_size=8192), texts[:500])


@contextmanager
def pinned(cores: int) -> Iterator[None]:
    """This thread, and the processes that it starts, on so many cores."""
    os.sched_setaffinity(0, CORES[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, CORES)


def preparation(source: Path, tokenizer, workers: int) -> Callable[[], int]:
    """Prepares the file, with as many workers as cores; returns the number of tokens."""
    from polygpt.data import DataConfig, open_source, prepare_in_parallel

    config, out = DataConfig(path=str(source), workers=workers), source.with_name(f"shards-{workers}")

    def work() -> int:
        shutil.rmtree(out, ignore_errors=True)
        with pinned(workers):
            shards = prepare_in_parallel(open_source(config), tokenizer, out, config)
        return shards.train.tokens + shards.validation.tokens - shards.train.documents - shards.validation.documents

    return work


def library(texts: list[str], tokenizer, folder: Path) -> Callable[[], int]:
    """Encodes the texts with the library alone; returns the number of tokens."""
    import tokenizers

    tokenizer.save(folder / "tokenizer.json")
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def work() -> int:
        total = 0
        with pinned(1):
            for start in range(0, len(texts), DOCUMENTS):
                found = own.encode_batch_fast(texts[start : start + DOCUMENTS], add_special_tokens=False)
                total += sum(len(encoding.ids) for encoding in found)
        return total

    return work


def demo_batch(tokens: int) -> dict[str, Callable[[], int]]:
    """The demo's training step, and a batch of shards with so many tokens; both return the tokens of one batch."""
    import jax
    import jax.numpy as jnp

    from polygpt.data import Loader
    from polygpt.model import model_of
    from polygpt.recipes import load_recipe
    from polygpt.training import Batch, Trainer

    config = load_recipe("demo", {"model.vocab_size": 4096})
    rows, context = config.training.batch_size, config.model.context_length
    trainer = Trainer(model_of(config.model), config.training)
    ids = np.random.default_rng(0).integers(0, 4096, (2, rows, context), np.int32)
    fixed = Batch(*map(jnp.asarray, ids), jnp.ones(ids.shape[1:]))
    state = trainer.init()
    compiled = trainer.compile_step(state, fixed)
    loader, numbers = Loader(sparse_split(1, tokens), context_length=context, batch_size=rows), count()

    def step() -> int:
        nonlocal state
        state, metrics = compiled(state, fixed)
        jax.block_until_ready((state, metrics))
        return rows * context

    def batch() -> int:
        jax.block_until_ready(Batch.of(loader.batch(next(numbers))))
        return rows * context

    return {"training step": step, "batch": batch}


def sparse_split(shards: int, tokens: int):
    """A split of so many shards of so many tokens each (all 0), in sparse files that are gone with this process."""
    from polygpt.data import TokenSplit
    from polygpt.data.shards import DTYPES, FileEntry, ShardEntry, SplitEntry

    folder = Path(_FOLDER.name) / f"sparse-{shards}"
    folder.mkdir()
    entries = []
    for index in range(shards):
        names = [f"train-{index:05d}.{kind}" for kind in ("tokens", "offsets")]
        with (folder / names[0]).open("wb") as stream:
            stream.truncate(tokens * DTYPES["uint16"].itemsize)
        (folder / names[1]).write_bytes(bytes(8))
        files = [FileEntry(name=name, sha256="0" * 64) for name in names]
        entries.append(ShardEntry(tokens_file=files[0], offsets_file=files[1], tokens=tokens, documents=1))
    total = shards * tokens
    entry = SplitEntry(documents=shards, tokens=total, bytes=4 * total, shards=tuple(entries))
    return TokenSplit("train", entry, folder, DTYPES["uint16"])


def shuffled_batches(tokens: int) -> Callable[[], int]:
    """A batch from anywhere in the shards; returns its number of tokens."""
    from polygpt.data import Loader

    loader, numbers = Loader(sparse_split(SHARDS, tokens), context_length=CONTEXT, batch_size=BATCH), count()

    def batch() -> int:
        loader.batch(next(numbers))
        return BATCH * CONTEXT

    return batch


def alternate(works: dict[str, Callable[[], int]], rounds: int, times: dict[str, int]) -> dict[str, list[float]]:
    """Tokens per second of each round of each work, which is done `times` in a row; a first round does not count."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            tokens = sum(work() for _ in range(times.get(name, 1)))
            rates[name].append(tokens / (time.perf_counter() - start))
    return {name: found[1:] for name, found in rates.items()}


def show(rates: dict[str, list[float]]) -> None:
    """Tokens per second, and the median ratio of a round to the first work's round beside it."""
    first = next(iter(rates.values()))
    for name, found in rates.items():
        ratios = [mine / its for mine, its in zip(found, first, strict=True)]
        ratio, spread = statistics.median(ratios), f"{min(ratios):.3g} to {max(ratios):.3g}"
        print(f"{name}: {statistics.median(found):,.0f} tokens/s, {ratio:.3g} ({spread})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], default=[], metavar="TASK")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=32, help="of text to prepare")
    parser.add_argument("--tokenizer", help="a tokenizer.json, its folder, or hf:owner/name")
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, help=f"in each of the {SHARDS} sparse shards")
    arguments = parser.parse_args()
    tasks = set(arguments.tasks or TASKS)
    folder = Path(_FOLDER.name)
    if {"prepare", "workers"} & tasks:
        texts = write_text(folder / "text.jsonl", arguments.megabytes)
        tokenizer = tokenizer_of(arguments.tokenizer, texts)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of this process: one core is one core
        one = preparation(folder / "text.jsonl", tokenizer, 1)
        if "prepare" in tasks:
            works = {"the library alone": library(texts, tokenizer, folder), "prepare_in_parallel": one}
            show(alternate(works, arguments.rounds, {}))
        if "workers" in tasks:
            two = preparation(folder / "text.jsonl", tokenizer, 2)
            show(alternate({"one worker": one, "two workers": two}, arguments.rounds, {}))
    if "shards" in tasks:
        with pinned(1):
            show(
                alternate(
                    {"shuffled batches": shuffled_batches(arguments.shard_tokens)},
                    arguments.rounds,
                    {"shuffled batches": 100},
                )
            )
    if "loader" in tasks:
        rates = alternate(demo_batch(arguments.shard_tokens), arguments.rounds, {"training step": 10, "batch": 100})
        show(rates)
        shares = [step / batch for step, batch in zip(rates["training step"], rates["batch"], strict=True)]
        print(f"a batch takes {statistics.median(shares):.2%} of a step ({min(shares):.2%} to {max(shares):.2%})")


_FOLDER = tempfile.TemporaryDirectory()

if __name__ == "__main__":
    main()
