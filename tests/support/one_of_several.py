"""`polygpt` as one of several processes of a test: its training loader records, is slow, and sends signals.

Arguments: settings as JSON (`record`: a file, `slow`: seconds a batch, `signal` and `at`: the signal that the process
sends itself when it reads that batch), then the words of the command.
"""

import json
import os
import sys
import time

from polygpt.data import Loader

SETTINGS, WORDS = json.loads(sys.argv[1]), sys.argv[2:]
read_batch = Loader.batch


def batch(self, i, rows=None):
    if self.shuffle:
        with open(SETTINGS["record"], "a", encoding="utf-8") as file:
            file.write(json.dumps([i, list(range(self.batch_size) if rows is None else rows)]) + "\n")
        time.sleep(SETTINGS.get("slow", 0))
        if SETTINGS.get("at") == i:
            os.kill(os.getpid(), SETTINGS["signal"])
    return read_batch(self, i, rows)


Loader.batch = batch

if __name__ == "__main__":
    from polygpt.cli import main

    main(WORDS)
