"""Training speed beside nanoGPT, and how long the program takes to start and to compile.

    python benchmarks/run.py [--nanogpt FOLDER] [--rounds 7] [--json] [WORKLOAD...]

Each framework lives in a process of its own; rounds alternate between them, and what counts is the ratio of medians.
nanoGPT is its public repository, checked out in FOLDER, and torch in the same Python; without them only polygpt runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from workloads import CPU, GPU, WORKLOADS, instruction_set

HERE = Path(__file__).parent


class Worker:
    """One framework's process."""

    def __init__(self, framework: str, workload: str, folder: str | None):
        # JAX would otherwise take most of a GPU's memory at once, beside torch.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        words = [sys.executable, str(HERE / "worker.py"), framework, workload, *([folder] if folder else [])]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.first_step = self._read()["ready"]
        self.times: list[float] = []

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a worker failed: {' '.join(self.process.args)}")
        return json.loads(line)

    def round(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.times.append(self._read()["seconds"])

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(name: str, folder: str | None, rounds: int) -> dict:
    """One workload in every framework at hand."""
    frameworks = ["polygpt"] + (["nanogpt", "nanogpt-compiled"] if folder else [])
    workers = {framework: Worker(framework, name, folder) for framework in frameworks}
    for _ in range(rounds):
        for worker in workers.values():
            worker.round()
    tokens = WORKLOADS[name].batch * WORKLOADS[name].context
    result: dict = {"workload": name, "rounds": rounds, "instruction_set": instruction_set()}
    for framework, worker in workers.items():
        worker.close()
        result[framework] = {
            "ms_per_step": 1e3 * statistics.median(worker.times),
            "tokens_per_second": tokens / statistics.median(worker.times),
            "seconds_to_first_step": worker.first_step,
        }
    if folder:
        best = min(result["nanogpt"]["ms_per_step"], result["nanogpt-compiled"]["ms_per_step"])
        result["speed_over_best_nanogpt"] = best / result["polygpt"]["ms_per_step"]
    return result


def startup(rounds: int) -> dict:
    """Seconds of `polygpt --help`, median of whole processes."""
    times = []
    for _ in range(rounds):
        before = time.perf_counter()
        subprocess.run([sys.executable, "-m", "polygpt", "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - before)
    return {"workload": "polygpt --help", "seconds": statistics.median(times)}


def matmul_rate() -> float | None:
    """TFLOP/s of a large bfloat16 product on the GPU: what the card gives at best. None without one."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() != "gpu":
        return None
    size = 8192
    a = jnp.ones((size, size), jnp.bfloat16)
    multiply = jax.jit(lambda a: a @ a)
    multiply(a).block_until_ready()
    times = []
    for _ in range(7):
        before = time.perf_counter()
        for _ in range(10):
            a = multiply(a)
        a.block_until_ready()
        times.append((time.perf_counter() - before) / 10)
    return 2 * size**3 / statistics.median(times) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--nanogpt", help="folder with nanoGPT's model.py")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    unknown = set(arguments.workloads) - set(WORKLOADS)
    if unknown:
        parser.error(f"no workload {', '.join(unknown)}; choose from {', '.join(WORKLOADS)}")
    rate = matmul_rate()
    names = arguments.workloads or (GPU if rate else CPU)
    results = [startup(arguments.rounds)]
    for name in names:
        results.append(compare(name, arguments.nanogpt, arguments.rounds))
        if not arguments.json:
            print(json.dumps(results[-1], indent=1), flush=True)
    if arguments.json:
        print(json.dumps({"matmul_tflops": rate, "results": results}))
    else:
        print(f"polygpt --help: {results[0]['seconds']:.3f} s" + (f"; matmul {rate:.0f} TFLOP/s" if rate else ""))


if __name__ == "__main__":
    main()
