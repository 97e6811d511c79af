"""The speed of two processes of one core each beside one process with two cores, training the demo's model.

    python benchmarks/processes.py [--rounds 5] [--seconds 8] [KEY=VALUE ...]

Both runs are `polygpt train demo`. They take turns: while one runs for some seconds, the other is stopped by SIGSTOP.
What is compared are the medians, over groups of five steps, of the tokens per second in `metrics.jsonl`. Groups that
contain a pause are slow, and few.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = [
    "training.steps=100000",
    "training.eval_every=0",
    "training.samples.every=0",
    "training.save_every=0",
    "training.log_every=5",
]


class Run:
    """`polygpt train demo` in one process for each of `cores`, which are sets of cores."""

    def __init__(self, folder: Path, cores: list[set[int]], words: list[str]):
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
        self.processes = []
        for index, own in enumerate(cores):
            command = [sys.executable, "-m", "polygpt", "train", "demo", *SETTINGS, *words, "--out", str(folder)]
            if len(cores) > 1:
                command += ["--coordinator", address, "--num-processes", str(len(cores)), "--process-id", str(index)]
            with folder.with_suffix(f".{index}.log").open("w") as log:
                pinned = ["taskset", "-c", ",".join(map(str, sorted(own))), *command]
                self.processes.append(subprocess.Popen(pinned, stdout=log, stderr=log))

    def send(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)

    def speeds(self) -> list[float]:
        """Tokens per second of the groups of steps so far, without the first two."""
        path = self.folder / "metrics.jsonl"
        lines = map(json.loads, path.read_text().splitlines()) if path.is_file() else []
        return [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][2:]

    def wait_for_steps(self) -> None:
        while not self.speeds():
            if any(process.poll() is not None for process in self.processes):
                sys.exit(self.folder.with_suffix(".0.log").read_text())
            time.sleep(0.2)


def main() -> None:
    """Prints both speeds and their ratio, as JSON."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--seconds", type=float, default=8)
    arguments.add_argument("words", nargs="*")
    asked = arguments.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as temporary:
        try:
            for name, own in {"one": [set(cores)], "two": [{core} for core in cores]}.items():
                runs[name] = Run(Path(temporary) / name, own, asked.words)
                runs[name].wait_for_steps()
                runs[name].send(signal.SIGSTOP)
            counts = {name: [len(run.speeds())] for name, run in runs.items()}
            for _ in range(asked.rounds):
                for name, run in runs.items():
                    run.send(signal.SIGCONT)
                    time.sleep(asked.seconds)
                    run.send(signal.SIGSTOP)
                    counts[name].append(len(run.speeds()))
            rounds = {
                name: [
                    statistics.median(run.speeds()[a:b]) for a, b in zip(counts[name], counts[name][1:], strict=False)
                ]
                for name, run in runs.items()
            }
        finally:
            for run in runs.values():
                run.send(signal.SIGKILL)
    ratios = [two / one for one, two in zip(rounds["one"], rounds["two"], strict=True)]
    print(json.dumps({"tokens_per_second": rounds, "ratios": ratios, "ratio": statistics.median(ratios)}, indent=1))


if __name__ == "__main__":
    main()
