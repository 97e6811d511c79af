"""A process that prepares tasks: `python -m polygpt.data.worker WORK BATCH_CHARS`; `workers.py` starts it.

It reads the numbers of tasks from standard input and answers each with a line of JSON on standard output. It ends when
standard input does, so that it does not outlive the process that started it by more than a moment.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from polygpt.data.tasks import Plan, read_plan, run_task
from polygpt.errors import PolygptError
from polygpt.tokenizers import Tokenizer


def main(work: Path, batch_chars: int) -> None:
    """Runs the tasks whose numbers come on standard input, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    asked: SimpleQueue[int] = SimpleQueue()
    threading.Thread(target=_listen, args=[asked], daemon=True).start()
    made, tokenizer = read_plan(work, batch_chars)
    while True:
        print(json.dumps(answer(work, asked.get(), made, tokenizer)), flush=True)


def answer(work: Path, task: int, made: Plan, tokenizer: Tokenizer) -> dict[str, Any]:
    """Runs a task; what came of it, or why it failed, ready for JSON."""
    try:
        return {"counts": asdict(run_task(work, task, made, tokenizer))}
    except PolygptError as error:
        return {"error": str(error), "kind": type(error).__name__}
    except OSError as error:
        return {
            "error": f"{error.filename or work}: cannot be written ({error.strerror or error})",
            "kind": "PolygptError",
        }


def _listen(asked: SimpleQueue[int]) -> None:
    for line in sys.stdin:
        asked.put(int(line))
    os._exit(0)  # whatever task is under way is no longer wanted


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
