"""Checkpoints: exact, whole or not there, and the newest that verifies is the one that loads."""

import asyncio
import gc
import json
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt import checkpoint
from polygpt.checkpoint import Evaluation, Keep, Snapshot
from polygpt.checkpoint import steps as steps_module
from polygpt.checkpoint.arrays import quiet_orbax
from polygpt.errors import PolygptError, RequestError

TREE = {
    "matrix": jnp.linspace(-1, 1, 96, dtype=jnp.float32).reshape(8, 12) / 3,
    "nested": {"half": jnp.arange(7, dtype=jnp.bfloat16) / 7, "count": jnp.int32(41)},
    "odd values": jnp.array([-0.0, 1e-45, 3.4e38], jnp.float32),
}


def save(root, step, tree=TREE, **settings):
    training = {"momentum": jnp.full(5, step / 7, jnp.float32)}
    snapshot = Snapshot(step, tree, training, {"data": "abc"}, 2, 1, (1.5, 1 / step), Evaluation(1, 0.5), 99.0)
    return checkpoint.save(root, snapshot, Keep(**settings))


def steps(root):
    return sorted(path.name for path in root.iterdir())


@pytest.fixture
def warned():
    return []


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Steps 1, 2 and 3; not to be written to."""
    root = tmp_path_factory.mktemp("saved")
    for step in (1, 2, 3):
        save(root, step, last=3)
    return root


@pytest.fixture
def root(saved, tmp_path):
    """A copy of `saved` to be damaged."""
    return shutil.copytree(saved, tmp_path / "root")


def test_every_bit_comes_back(saved):
    training = {"momentum": jnp.full(5, 3 / 7, jnp.float32)}
    restored = checkpoint.restore(checkpoint.newest(saved), *jax.eval_shape(lambda: (TREE, training)))
    for tree, original in ((restored.params, TREE), (restored.training, training)):
        assert jax.tree.structure(tree) == jax.tree.structure(original)
        for found, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(original), strict=True):
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()
    assert (restored.step, restored.fingerprints, restored.batch_offset) == (3, {"data": "abc"}, 2)
    assert (restored.recent_losses, restored.tokens_per_second) == ((1.5, 1 / 3), 99.0)
    assert restored.best == Evaluation(1, 0.5)


def test_a_model_alone_has_no_state_of_training(tmp_path):
    saved = checkpoint.save(tmp_path, Snapshot(0, TREE))
    assert {path.name for path in saved.folder.iterdir()} == {"params", "info.json", "manifest.json"}
    assert checkpoint.restore(checkpoint.verify(saved.folder), TREE).training is None


def test_the_newest_step_is_taken_with_its_info(saved, warned):
    found = checkpoint.newest(saved, warned.append)
    assert (found.step, found.info["step"], found.folder.name) == (3, 3, "step_00000003")
    assert not warned


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_without_a_step_there_is_none(tmp_path, make, warned):
    make(tmp_path / "root")
    assert checkpoint.newest(tmp_path / "root", warned.append) is None
    assert not warned


def files_of_a_step(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_flipped_byte_in_any_file_is_named_and_the_step_before_taken(saved, root, warned):
    last = saved / "step_00000003"
    names = files_of_a_step(last)
    assert {"info.json", "manifest.json"} < set(names)
    assert sum("/d/" in name for name in names) >= 2
    for name in names:
        path = root / last.name / name
        data = bytearray(path.read_bytes())
        at = len(data) // 2 if name != "manifest.json" else data.index(b'"sha256": "') + 12
        data[at] ^= 1
        path.write_bytes(data)
        assert checkpoint.newest(root, warned.append).step == 2, name
        told = warned.pop()
        assert last.name in told
        assert "the step before" in told
        assert name == "manifest.json" or name in told
        shutil.copy(last / name, path)
    assert checkpoint.newest(root, warned.append).step == 3


@pytest.mark.parametrize("name", ["info.json", "params/_METADATA", "params/manifest.ocdbt", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "longer", "gone"])
def test_a_file_cut_short_lengthened_or_gone_is_noticed(root, name, damage, warned):
    path = root / "step_00000003" / name
    data = path.read_bytes()
    match damage:
        case "gone":
            path.unlink()
        case "cut":
            path.write_bytes(data[:-3])
        case "longer":
            path.write_bytes(data + b"\n}")
    assert checkpoint.newest(root, warned.append).step == 2
    assert len(warned) == 1


@pytest.mark.parametrize("manifest", ["", "[]", "5", "{}", '{"format": 3, "step": 3, "files": {}}', "\x00"])
def test_a_manifest_that_is_none_is_noticed(root, manifest, warned):
    (root / "step_00000003/manifest.json").write_text(manifest)
    assert checkpoint.newest(root, warned.append).step == 2
    assert len(warned) == 1


def test_an_empty_and_a_half_copied_folder_are_passed_over_with_a_warning(root, warned):
    (root / "step_00000008").mkdir()
    shutil.copytree(root / "step_00000003/params", root / "step_00000009/params")
    assert checkpoint.newest(root, warned.append).step == 3
    assert ["step_00000009" in warned[0], "step_00000008" in warned[1]] == [True, True]
    assert all("incomplete checkpoint, manifest.json is missing" in told for told in warned)


def test_a_step_under_another_steps_name_is_passed_over(root, warned):
    shutil.copytree(root / "step_00000001", root / "step_00000007")
    assert checkpoint.newest(root, warned.append).step == 3
    assert "holds step 1" in warned[0]


def test_files_and_folders_of_other_names_are_no_steps(root, warned):
    (root / "notes.txt").write_text("mine")
    (root / ".step_00000009.partial").mkdir()
    shutil.copytree(root / "step_00000002", root / "step_00000009 (copy)")
    (root / "step_9").mkdir()
    assert checkpoint.newest(root, warned.append).step == 3
    assert not warned


def test_a_file_with_the_name_of_a_step_is_passed_over_with_a_warning(root, warned):
    (root / "step_00000009").write_text("x")
    assert checkpoint.newest(root, warned.append).step == 3
    assert "step_00000009" in warned[0]


def test_a_file_of_the_users_beside_the_arrays_does_no_harm(root, warned):
    (root / "step_00000003/params/.DS_Store").write_text("x")
    found = checkpoint.newest(root, warned.append)
    assert found.step == 3
    assert checkpoint.restore(found, TREE).params["nested"]["count"] == 41


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": jnp.zeros((8, 12), jnp.bfloat16)}, r"matrix is float32\[8, 12\] here, bfloat16\[8, 12\] in"),
        ({"matrix": jnp.zeros((12, 8))}, r"matrix is float32\[8, 12\] here, float32\[12, 8\] in the model"),
        ({"more": jnp.zeros(3)}, r"more is absent here, float32\[3\] in the model"),
        ({"nested": {"count": jnp.int32(0)}}, r"nested\.half is bfloat16\[7\] here, absent in the model"),
    ],
)
def test_another_dtype_shape_or_name_is_refused_by_name(saved, change, message):
    with pytest.raises(RequestError, match=message):
        checkpoint.restore(checkpoint.newest(saved), TREE | change)


def test_all_that_differ_are_named_and_dtypes_are_cast_only_on_request(saved):
    found, half = checkpoint.newest(saved), jax.tree.map(lambda leaf: leaf.astype(jnp.float16), TREE)
    half["odd values"] = TREE["odd values"]  # one of them is beyond float16
    with pytest.raises(RequestError) as error:
        checkpoint.restore(found, half)
    assert [name in str(error.value) for name in ("matrix is", "nested.half is", "nested.count is")] == [True] * 3
    assert "cast=True" in str(error.value)
    cast = checkpoint.restore(found, half, cast=True).params
    assert (cast["matrix"].dtype, cast["nested"]["half"].dtype) == (jnp.float16, jnp.float16)
    np.testing.assert_array_equal(cast["matrix"], TREE["matrix"].astype(jnp.float16))
    with pytest.raises(RequestError, match="more is absent here"):
        checkpoint.restore(found, half | {"more": jnp.zeros(3)}, cast=True)
    many = {f"leaf{i:02}": jnp.zeros(1) for i in range(20)}
    with pytest.raises(RequestError, match=r"leaf09 is absent.*; and 14 more; "):
        checkpoint.restore(found, many)


def test_weights_of_the_first_format_are_read(root):
    step = root / "step_00000003"
    (step / "training").rename(step / "optimizer")
    path = step / "manifest.json"
    manifest = json.loads(path.read_text())
    files = {name.replace("training/", "optimizer/"): value for name, value in manifest["files"].items()}
    path.write_text(json.dumps(manifest | {"format": 1, "files": files}))
    found = checkpoint.newest(root)
    assert (found.step, found.resumable) == (3, False)
    np.testing.assert_array_equal(checkpoint.restore(found, TREE).params["matrix"], TREE["matrix"])


# --- Saving -------------------------------------------------------------------------------------------------


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


# --- Values that are not finite -----------------------------------------------------------------------------


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


def test_what_is_not_finite_is_not_restored(tmp_path, monkeypatch):
    """A checkpoint that an earlier version saved."""
    with monkeypatch.context() as patch:
        patch.setattr("polygpt.checkpoint.steps.check_finite", lambda *_: None)
        saved = checkpoint.save(tmp_path, Snapshot(1, TREE | {"matrix": TREE["matrix"].at[3, 4].set(jnp.nan)}))
    with pytest.raises(checkpoint.NotFiniteError, match=r"step_00000001/params: matrix holds values that are not"):
        checkpoint.restore(saved, TREE)


def test_a_first_save_that_fails_claims_no_earlier_checkpoint(tmp_path):
    with pytest.raises(PolygptError, match="no checkpoint has been saved"):
        checkpoint.save(tmp_path, Snapshot(1, TREE, tokens_per_second=float("nan")))
    save(tmp_path, 1)
    with pytest.raises(PolygptError, match="earlier checkpoints are intact"):
        checkpoint.save(tmp_path, Snapshot(2, TREE, tokens_per_second=float("nan")))
