"""Folders of arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.checkpoint.arrays import read_arrays, write_arrays


@pytest.mark.parametrize("name", ["run[1]", "a*b?", "gs:", "back\\slash", "#1 {x}"])
def test_a_folder_may_have_any_name(tmp_path, name):
    arrays = {"matrix": jnp.arange(6.0).reshape(2, 3), "count": jnp.int32(41)}
    folder = tmp_path / name / "params"
    folder.parent.mkdir()
    write_arrays(folder, arrays)
    for key, values in read_arrays(folder, arrays).items():
        np.testing.assert_array_equal(values, arrays[key])
    assert [path.name for path in folder.parent.iterdir()] == ["params"]
