"""One framework training one workload, a round at a time: prints "ready", then for each line it reads one time.

    python benchmarks/worker.py polygpt|nanogpt|nanogpt-compiled WORKLOAD [NANOGPT_FOLDER]

A round's line is JSON: seconds a step (median over the round's steps), and once the seconds until the first step.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
from workloads import WORKLOADS, Workload


def main() -> None:
    framework, name, *folder = sys.argv[1:]
    # nanoGPT prints on standard output, which is for times alone.
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    workload = WORKLOADS[name]
    started = time.perf_counter()
    if framework == "polygpt":
        step = polygpt_step(workload)
    else:
        step = nanogpt_step(workload, folder[0], compiled=framework.endswith("compiled"))
    step()
    first = time.perf_counter() - started
    for _ in range(2):
        step()
    print(json.dumps({"ready": first}), file=reply, flush=True)
    for _ in sys.stdin:
        times = []
        for _ in range(workload.steps):
            before = time.perf_counter()
            step()
            times.append(time.perf_counter() - before)
        print(json.dumps({"seconds": statistics.median(times)}), file=reply, flush=True)


def batches(workload: Workload) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, workload.vocab, (workload.batch, workload.context + 1))
    return tokens.astype(np.int32)


def polygpt_step(workload: Workload) -> Callable[[], None]:
    """A step that returns when it is done."""
    from polygpt.process import keep_freed_memory

    keep_freed_memory()  # as the command does
    import jax
    import jax.numpy as jnp

    from polygpt.config import validate
    from polygpt.model import Model, ModelConfig
    from polygpt.training import Batch, Trainer, TrainingConfig

    norm = {"kind": "layernorm", "bias": workload.bias}
    fields = {
        "vocab_size": workload.vocab,
        "context_length": workload.context,
        "embed_dim": workload.width,
        "num_layers": workload.layers,
        "position": "learned",
        "norm": norm,
        "attention": {
            "kind": "softmax",
            "num_heads": workload.heads,
            "bias": workload.bias,
            "dropout": workload.dropout,
        },
        "feedforward": {
            "kind": "mlp",
            "mlp_dim": 4 * workload.width,
            "bias": workload.bias,
            "activation": "gelu_exact",  # as nanoGPT's
        },
        "dropout": workload.dropout,
        "embed_dropout": workload.dropout,
        "compute_dtype": workload.dtype,
    }
    training = {"steps": 1000, "batch_size": workload.batch, "optimizer": {"kind": "adamw", "learning_rate": 1e-3}}
    trainer = Trainer(Model(validate(ModelConfig, fields)), validate(TrainingConfig, training))
    tokens = batches(workload)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((workload.batch, workload.context), np.float32))
    batch = jax.tree.map(jnp.asarray, batch)
    state = trainer.init()
    function = trainer.compile_step(state, batch)
    if "--text" in sys.argv:
        print(function.as_text(), file=sys.stderr)

    def step() -> None:
        nonlocal state
        state, metrics = function(state, batch)
        jax.block_until_ready((state, metrics))

    return step


def nanogpt_step(workload: Workload, folder: str, compiled: bool) -> Callable[[], None]:
    """The same with nanoGPT's model.py, its optimizer, autocast and clipping, as its train.py has them."""
    sys.path.insert(0, folder)
    import torch
    from model import GPT, GPTConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    config = GPTConfig(
        block_size=workload.context,
        vocab_size=workload.vocab,
        n_layer=workload.layers,
        n_head=workload.heads,
        n_embd=workload.width,
        dropout=workload.dropout,
        bias=workload.bias,
    )
    model = GPT(config).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device)
    if compiled:
        model = torch.compile(model)
    low = workload.dtype == "bfloat16" and device == "cuda"
    autocast = torch.amp.autocast("cuda", torch.bfloat16) if low else nullcontext()
    tokens = torch.from_numpy(batches(workload).astype(np.int64)).to(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        with autocast:
            _, loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


if __name__ == "__main__":
    main()
