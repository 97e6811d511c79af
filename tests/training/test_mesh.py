"""The mesh that a run takes of the devices that there are."""

import json
import os
import subprocess
import sys

PROGRAM = """
import json
from polygpt.cli.output import mesh_of as of_words
from polygpt.config import validate
from polygpt.model import Model
from polygpt.presets import preset
from polygpt.training import RunConfig
from polygpt.training.mesh import mesh_of

def ids(scope):
    return None if scope is None else [device.id for device in scope.mesh.devices.ravel()]

model = preset("gpt", num_layers=1, embed_dim=12, vocab_size=16)
found = {}
for rows in (8, 6, 7, 1):
    fields = {"model": model.to_dict(), "training": {"steps": 1, "batch_size": rows}, "mesh": "auto"}
    notes = []
    scope = mesh_of(validate(RunConfig, fields), Model(model), notes.append)
    found[rows] = [ids(scope), ids(of_words(["mesh=auto"], rows)), notes[0].text]
print(json.dumps(found))
"""


def test_auto_takes_as_many_devices_as_divide_the_batch():
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for rows, count in (("8", 4), ("6", 3), ("7", None), ("1", None)):
        devices = None if count is None else list(range(count))
        assert found[rows][:2] == [devices, devices], rows
        assert found[rows][2].startswith(f"mesh: data {count or 1}")
