"""What is measured: training steps of four GPTs, as polygpt and as nanoGPT spell them.

Each is one step of forward, backward, clipping to norm 1 and AdamW, on random tokens. Knows neither framework.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


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


def instruction_set() -> str:
    """The widest vector instructions that XLA compiles for here: the processor's, or less if XLA_FLAGS say so.

    XLA's libraries for products look at the processor itself, whatever XLA_FLAGS say.
    """
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    own = [name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("avx", "AVX")) if flag in flags]
    limit = re.search(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    limit = limit[1].upper() if limit else None
    if not own or limit is None or limit.startswith("AVX512") or limit == "AMX":
        return own[0] if own else "unknown"
    return f"{limit} (XLA_FLAGS; the processor has {own[0]})" if limit != own[0] else limit
