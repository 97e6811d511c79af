"""One of several processes of a test of `polygpt.distributed`: prints what came of each case as a line of JSON.

Arguments: the coordinator's address, the number of processes, this one's number, a folder, and the cases to run.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from polygpt import distributed
from polygpt.errors import PolygptError, RequestError
from polygpt.training import RunConfig, multiprocess

COORDINATOR, COUNT, INDEX, FOLDER = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
RUN = {
    "model": {
        "vocab_size": 16,
        "context_length": 8,
        "embed_dim": 8,
        "num_layers": 1,
        "position": {"kind": "rope"},
        "norm": {"kind": "rmsnorm"},
        "attention": {"kind": "softmax", "num_heads": 2},
        "feedforward": {"kind": "mlp", "mlp_dim": 16},
    },
    "training": {"steps": 10, "batch_size": 8},
}


def config(**training):
    return RunConfig.model_validate({**RUN, "training": {**RUN["training"], **training}})


def exchanges():
    values = distributed.exchange("a", {"own": INDEX})
    return [values, distributed.main_decides("b", lambda: f"of {INDEX}"), distributed.exchange("c", None)]


def same():
    multiprocess.check_same_request(config(), FOLDER, resume=False)
    with distributed.shared_folder(FOLDER / "new" / "folder", "--out"):
        return "agreed"


def another_configuration():
    multiprocess.check_same_request(config(batch_size=8 * (1 + INDEX), seed=INDEX), FOLDER, resume=False)


def another_version():
    version, multiprocess.metadata = (
        multiprocess.metadata.version,
        SimpleNamespace(
            version=lambda name: "0.0.1" if name == "flax" and INDEX else version(name),
            PackageNotFoundError=multiprocess.metadata.PackageNotFoundError,
        ),
    )
    multiprocess.check_same_request(config(), FOLDER, resume=False)


def another_folder():
    from polygpt.distributed import agreement

    agreement.APPEARS = 0.5
    with distributed.shared_folder(FOLDER / str(INDEX), "--out run"):
        pass


def other_data():
    splits = SimpleNamespace(validation=SimpleNamespace(fingerprint="same"))
    multiprocess.fingerprints = lambda run: {"data": f"tokens of {INDEX}", "seed": "1"}
    multiprocess.opened_by_all(SimpleNamespace(shards=splits), None, FOLDER, resume=False)


def stopping():
    """Process 0 runs far ahead, process 1 receives the signal: both stop after the same step."""
    received = threading.Event()
    agreement = distributed.StopAgreement(lambda: signal.SIGTERM if received.is_set() else None, lambda number: None)
    with distributed.watching(), agreement.active():
        for step in range(1, 100_000):
            if INDEX == 1 and step == 5:
                received.set()
            if agreement.reached(step):
                return [step, int(agreement.number)]
            time.sleep(0.01 if INDEX == 0 else 0.05)
    return None


def failing():
    """Process 1 fails; the others, which wait for it, end with its error and its code."""
    with distributed.watching():
        if INDEX == 1:
            raise RequestError("the text is missing")
        distributed.exchange("never", None)


def silent():
    """The last process no longer runs, without ending: the others end."""
    with distributed.watching():
        distributed.exchange("watched", None)
        time.sleep(1)
        if INDEX == COUNT - 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(100)


def main():
    distributed.start(distributed.Launch(COORDINATOR, COUNT, INDEX))
    code = 0
    for name in sys.argv[5:]:
        try:
            said = {"value": globals()[name]()}
        except PolygptError as error:
            said = {"error": str(error), "code": error.exit_code}
            code = error.exit_code if name == "failing" else code
        print(json.dumps({"case": name, **said}), flush=True)
    distributed.leave(code)


main()
