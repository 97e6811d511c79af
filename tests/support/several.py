"""Runs of several processes and devices on this machine, and what they leave."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from polygpt import checkpoint

SCRIPT = Path(__file__).parent / "one_of_several.py"


class Processes:
    """`polygpt` in several processes, `devices` in each; `settings` of `one_of_several.py` by process or for all."""

    def __init__(self, folder, count, *words, devices=1, settings=None, own_words=None, env=None):
        settings = settings or {}
        self.folder, self.records = folder, [folder / f"read.{os.urandom(4).hex()}" for _ in range(count)]
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
        flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        environment = {**os.environ, "XLA_FLAGS": flags, **(env or {})}
        self.started = []
        for index in range(count):
            own = {
                "record": str(self.records[index]),
                **(settings or {}).get(index, {}),
                **(settings or {}).get("all", {}),
            }
            options = ["--coordinator", address, "--num-processes", str(count), "--process-id", str(index)]
            options = options if count > 1 else []
            command = [sys.executable, str(SCRIPT), json.dumps(own)]
            command += [str(word) for word in [*words, *(own_words or {}).get(index, ()), *options]]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
            self.started.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))

    def wait(self, timeout=400):
        """The exit codes, and what was printed to standard output and standard error."""
        try:
            said = [process.communicate(timeout=timeout) for process in self.started]
        finally:
            for process in self.started:
                process.kill()
        self.codes = [process.returncode for process in self.started]
        self.out, self.err = zip(*said, strict=True)
        return self

    def read(self, index):
        """What process `index` has read of each batch: {batch: rows}."""
        return dict(map(json.loads, self.records[index].read_text().splitlines()))

    def restored(self):
        """The arrays that the processes have restored, from the parts that each holds."""
        found = {}
        for record in self.records:
            with np.load(f"{record}.npz") as stored:
                for key, part in stored.items():
                    name, shape, index = json.loads(key)
                    whole = found.setdefault(name, np.full(shape, 99, part.dtype))
                    whole[tuple(slice(*bounds) for bounds in index)] = part
        return found


def losses(run):
    """The loss of each step in a run's metrics, each of which stands there once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line["loss"] for line in lines if line["event"] == "step"}
    assert len(steps) == sum(line["event"] == "step" for line in lines)  # every line once: one process writes
    return steps


def arrays(run, step):
    """All arrays of a checkpoint, as one device reads them."""
    folder, read = checkpoint.verify(checkpoint.step_folder(run / "checkpoints", step)).folder, {}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        for name in ("params", "training"):
            shapes = dict(checkpointer.metadata(folder / name).item_metadata)
            like = {k: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=place) for k, m in shapes.items()}
            read |= {f"{name}.{k}": np.asarray(v) for k, v in checkpointer.restore(folder / name, like).items()}
    return read
