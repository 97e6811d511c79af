"""The table from logical axes to the mesh, and parameters placed by it."""

import jax
import numpy as np
from jax.sharding import PartitionSpec

from polygpt.model import Model
from polygpt.presets import PRESETS, preset
from polygpt.sharding import RULES, make_mesh, sharding_of


def test_axes_go_where_the_table_says():
    mesh = make_mesh()
    assert mesh.axis_names == ("data", "model")
    spec = sharding_of(("layers", "embed", "heads", "head_dim"), mesh).spec
    assert spec == PartitionSpec(None, None, "model", None)
    assert set(RULES.values()) <= set(mesh.axis_names)


def test_every_parameter_of_every_preset_has_a_placement():
    mesh = make_mesh()
    for name in PRESETS:
        for info in jax.tree.leaves(Model(preset(name).with_vocab(128)).parameters):
            assert len(sharding_of(info.axes, mesh).spec) == len(info.shape), name


def test_a_mesh_axis_splits_one_axis_of_an_array_experts_before_their_hidden_units():
    spec = sharding_of(("layers", "expert", "embed", "mlp"), make_mesh()).spec
    assert spec == PartitionSpec(None, "model", None, None)


def test_placing_an_array_keeps_its_values():
    array = np.arange(12.0).reshape(3, 4)
    placed = jax.device_put(array, sharding_of(("vocab", "embed"), make_mesh()))
    np.testing.assert_array_equal(placed, array)
