"""A checkpoint goes on on any other number of devices and processes: the same arrays, batches and losses."""

import shutil

import numpy as np
import pytest
from several import Processes, arrays, losses
from tiny_recipe import tiny_recipe

TRAINING = """\
steps: 12
batch_size: 8
save_every: 6
keep: 9
log_every: 3
schedule: {kind: constant}
"""


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A run on eight devices, whole, with a checkpoint in its middle: the folder that it is in."""
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "text.txt").write_text("the cat sat on a mat and then it ran home again. " * 200)
    (folder / "run.yaml").write_text(tiny_recipe(TRAINING, heads=4))
    ran = Processes(folder, 1, "train", "run.yaml", "mesh.data=8", "--out", "eight", devices=8).wait()
    assert ran.codes == [0], ran.err
    return folder


LAYOUTS = {
    "8 as 2x4": (1, 8, ["mesh.data=2", "mesh.fsdp=4"]),
    "4": (1, 4, ["mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2"]),
    "1": (1, 1, ["mesh="]),
    "2 processes of 2": (2, 2, ["mesh.data=2", "mesh.fsdp=2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_eight_devices_goes_on_on_others(eight, layout):
    processes, devices, mesh = LAYOUTS[layout]
    whole, run = eight / "eight", eight / layout
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step_00000012")
    ran = Processes(eight, processes, "train", "--resume", "--out", run, *mesh, devices=devices).wait()
    assert ran.codes == [0] * processes, ran.err
    assert "changed: mesh" in ran.err[0]
    saved, restored = arrays(run, 6), ran.restored()
    assert {f"{'' if name.startswith('params.') else 'training.'}{name}" for name in restored} == saved.keys()
    for name, values in restored.items():
        stored = saved[name if name.startswith("params.") else f"training.{name}"]
        np.testing.assert_array_equal(values, stored, err_msg=name)
        assert values.dtype == stored.dtype
    # The same batches next; batch 0 gives the shapes to compile for.
    rows = [ran.read(index) for index in range(processes)]
    assert all(own.keys() == {0, *range(6, 12)} for own in rows)
    assert all(sorted(row for own in rows for row in own[i]) == list(range(8)) for i in range(6, 12))
    np.testing.assert_allclose(list(losses(run).values()), list(losses(whole).values()), rtol=1e-4)
