"""The process that compiles: `python -m polygpt.planning.worker`; `compile_elsewhere` starts it.

A process has as many simulated devices as it was started with, so every plan has one of its own. It reads a
configuration from standard input and answers with a line of JSON on standard output.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

from polygpt.config import validate
from polygpt.errors import PolygptError, RequestError
from polygpt.planning.program import Program, compile_program
from polygpt.planning.request import portable
from polygpt.training import RunConfig

_COUNT = "--xla_force_host_platform_device_count"


def compile_elsewhere(config: RunConfig) -> Program:
    """`compile_program` in a process of its own.

    Raises:
        RequestError: the step cannot be traced for this mesh.
        PolygptError: the process fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "polygpt.planning.worker"],
        input=json.dumps(portable(config)),
        capture_output=True,
        encoding="utf-8",
        env=_environment(1 if config.mesh is None else config.mesh.devices),
    )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise PolygptError(f"the step could not be compiled for this mesh: {last[:300]}") from None
    if "error" in answer:
        raise (RequestError if answer["request"] else PolygptError)(answer["error"])
    return Program(**answer)


def _environment(devices: int) -> dict[str, str]:
    flags = re.sub(rf"{_COUNT}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is read from a cache is not partitioned again
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": f"{flags} {_COUNT}={devices}".strip(),
    }


def main() -> None:
    """Compiles the step of the configuration on standard input."""
    fields = json.load(sys.stdin)
    try:
        answer: dict[str, Any] = compile_program(validate(RunConfig, fields))._asdict()
    except PolygptError as error:
        answer = {"error": str(error), "request": isinstance(error, RequestError)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
