"""Checkpoints that are read: exact, or refused by name, and the newest that verifies is the one that loads."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import TREE, files_of_a_step

from polygpt import checkpoint
from polygpt.checkpoint import Evaluation, Snapshot
from polygpt.errors import RequestError


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


def test_what_is_not_finite_is_not_restored(tmp_path, monkeypatch):
    """A checkpoint that an earlier version saved."""
    with monkeypatch.context() as patch:
        patch.setattr("polygpt.checkpoint.steps.check_finite", lambda *_: None)
        saved = checkpoint.save(tmp_path, Snapshot(1, TREE | {"matrix": TREE["matrix"].at[3, 4].set(jnp.nan)}))
    with pytest.raises(checkpoint.NotFiniteError, match=r"step_00000001/params: matrix holds values that are not"):
        checkpoint.restore(saved, TREE)
