"""Checkpoints that are written: whole or not there, and which of them stay."""

import asyncio
import gc
import json
import resource
import subprocess
import sys

import jax.numpy as jnp
import pytest
from checkpoints import TREE, files_of_a_step, save, steps

from polygpt import checkpoint
from polygpt.checkpoint import Snapshot
from polygpt.checkpoint import steps as steps_module
from polygpt.checkpoint.arrays import quiet_orbax
from polygpt.errors import PolygptError


def test_the_newest_few_steps_stay(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step, last=2)
    assert steps(tmp_path) == ["step_00000003", "step_00000004"]


def test_a_later_step_that_fails_does_not_push_out_the_one_just_saved(tmp_path, warned):
    save(tmp_path, 2, last=1)
    (tmp_path / "step_00000009").mkdir()
    save(tmp_path, 3, last=1)
    assert steps(tmp_path) == ["step_00000003", "step_00000009"]
    assert checkpoint.newest(tmp_path, warned.append).step == 3


def test_half_a_step_does_not_count_among_those_that_stay(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_00000002").mkdir()
    save(tmp_path, 3, last=2)
    assert "step_00000001" in steps(tmp_path)


def test_a_step_is_saved_again(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 1, TREE | {"matrix": TREE["matrix"] + 1})
    restored = checkpoint.restore(checkpoint.newest(tmp_path), TREE).params
    assert jnp.array_equal(restored["matrix"], TREE["matrix"] + 1)
    assert steps(tmp_path) == ["step_00000001"]


def test_a_save_leaves_what_another_process_is_writing_alone(tmp_path):
    (tmp_path / ".step_00000001.abcd.partial/params").mkdir(parents=True)
    save(tmp_path, 2)
    assert steps(tmp_path) == [".step_00000001.abcd.partial", "step_00000002"]
    checkpoint.remove_partial(tmp_path)
    assert steps(tmp_path) == ["step_00000002"]


def test_every_nth_and_the_best_step_stay_too(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, last=1, every=3, best=2)
    assert [int(name[5:]) for name in steps(tmp_path)] == [2, 3, 6, 7]


def test_the_manifest_is_written_last_and_lists_every_other_file(tmp_path, monkeypatch):
    write, there = steps_module._write_json, []

    def noted(path, value):
        write(path, value)
        there.append(files_of_a_step(path.parent))

    monkeypatch.setattr(steps_module, "_write_json", noted)
    save(tmp_path, 3)
    last = tmp_path / "step_00000003"
    assert there[-1] == files_of_a_step(last), "nothing is written after the manifest"
    assert not any("manifest.json" in files for files in there[:-1])
    listed = json.loads((last / "manifest.json").read_text())["files"]
    assert sorted([*listed, "manifest.json"]) == files_of_a_step(last)


def test_info_that_is_no_json_number_is_refused_and_leaves_nothing(root):
    with pytest.raises(PolygptError, match="cannot be saved"):
        checkpoint.save(root, Snapshot(4, TREE, tokens_per_second=float("nan")))
    assert steps(root) == ["step_00000001", "step_00000002", "step_00000003"]


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(PolygptError, match="step_00000001: cannot be saved") as error:
        save(tmp_path / "file", 1)
    assert error.value.exit_code == 1


FULL_DISK = """
import resource, sys
from pathlib import Path
import jax.numpy as jnp
from polygpt import checkpoint
from polygpt.checkpoint import Snapshot
from polygpt.errors import PolygptError
root, limit = Path(sys.argv[1]), int(sys.argv[2])
tree = {f"matrix{i}": jnp.sin(1.7 * jnp.arange(300_000, dtype=jnp.float32)) for i in range(8)}
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    checkpoint.save(root, checkpoint.Snapshot(9, tree))
except PolygptError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="files cannot be limited here")
@pytest.mark.parametrize("limit", [0, 2_000, 200_000])
def test_a_write_that_fails_leaves_the_steps_before_as_they_were(root, limit, snapshot, warned):
    before = snapshot(root)
    command = [sys.executable, "-c", FULL_DISK, str(root), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    step = root / "step_00000009"
    assert done.stdout == f"{step}: cannot be saved (File too large); earlier checkpoints are intact\n"
    assert done.stderr == ""
    assert snapshot(root) == before
    assert checkpoint.newest(root, warned.append).step == 3


def test_a_write_whose_failure_nobody_waits_for_is_not_logged(caplog):
    with quiet_orbax():
        loop = asyncio.new_event_loop()
    failed = loop.create_future()
    failed.set_exception(OSError("No space left on device"))
    del failed
    gc.collect()
    loop.close()
    assert caplog.records == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("place", ["params", "training"])
def test_what_is_not_finite_is_not_saved(root, snapshot, value, dtype, place):
    before = snapshot(root)
    bad = {"a": {"good": jnp.arange(3), "bad": jnp.array([1.0, value, 2.0], dtype)}}
    trees = {"params": TREE, "training": TREE} | {place: bad}
    with pytest.raises(checkpoint.NotFiniteError, match=rf"^step 4: {place}: .*a\.bad holds values that are not"):
        checkpoint.save(root, Snapshot(4, **trees))
    assert snapshot(root) == before


def test_a_first_save_that_fails_claims_no_earlier_checkpoint(tmp_path):
    with pytest.raises(PolygptError, match="no checkpoint has been saved"):
        checkpoint.save(tmp_path, Snapshot(1, TREE, tokens_per_second=float("nan")))
    save(tmp_path, 1)
    with pytest.raises(PolygptError, match="earlier checkpoints are intact"):
        checkpoint.save(tmp_path, Snapshot(2, TREE, tokens_per_second=float("nan")))
