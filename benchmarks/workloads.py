"""What is measured: training steps of four GPTs, as polygpt and as nanoGPT spell them.

Each is one step of forward, backward, clipping to norm 1 and AdamW, on random tokens. Knows neither framework.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """The shape of a GPT and of its batch; a GPT-2 block, tied head, learned positions."""

    layers: int
    heads: int
    width: int
    context: int
    vocab: int
    batch: int
    bias: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    steps: int = 10  # a round, of which the median time is taken


WORKLOADS = {
    # nanoGPT's own recipe for a CPU
    "shakespeare_char_cpu": Workload(4, 4, 128, 64, 65, 12, steps=30),
    # a small GPT with a vocabulary
    "gpt_256": Workload(6, 4, 256, 256, 8192, 16, steps=2),
    # nanoGPT's own recipe for a GPU
    "shakespeare_char_gpu": Workload(6, 6, 384, 256, 65, 64, dropout=0.2, dtype="bfloat16", steps=30),
    # GPT-2 124M
    "gpt2": Workload(12, 12, 768, 1024, 50304, 16, bias=True, dtype="bfloat16", steps=10),
}
CPU, GPU = ("shakespeare_char_cpu", "gpt_256"), ("shakespeare_char_gpu", "gpt2")
