"""`polygpt` as one of several processes of a test: its training loader records, is slow, and sends signals.

The state that it restores is recorded, too. Arguments: settings as JSON (`record`: a file; `slow`: seconds a batch;
`signal` and `at`: the signal that the process sends itself when it reads that batch), then the words of the command.
"""

import json
import os
import sys
import time

import jax
import numpy as np

from polygpt.data import Loader
from polygpt.training.restoring import Restoring

SETTINGS, WORDS = json.loads(sys.argv[1]), sys.argv[2:]
read_batch, read_state = Loader.batch, Restoring.newest


def batch(self, i, rows=None):
    if self.shuffle:
        with open(SETTINGS["record"], "a", encoding="utf-8") as file:
            file.write(json.dumps([i, list(range(self.batch_size) if rows is None else rows)]) + "\n")
        time.sleep(SETTINGS.get("slow", 0))
        if SETTINGS.get("at") == i:
            os.kill(os.getpid(), SETTINGS["signal"])
    return read_batch(self, i, rows)


def newest(self):
    """The restored state, of which this process's parts go to a file: each by name, whole shape and place."""
    state, parts = read_state(self), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        for shard in leaf.addressable_shards:
            index = [part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape, strict=True)]
            parts[json.dumps([name, leaf.shape, index])] = np.asarray(shard.data)
    np.savez(SETTINGS["record"] + ".npz", **parts)
    return state


Loader.batch, Restoring.newest = batch, newest

if __name__ == "__main__":
    from polygpt.cli import main

    main(WORDS)
