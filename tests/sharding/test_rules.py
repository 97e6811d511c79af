"""The tables from logical axes to mesh axes, and parameters placed by them."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from polygpt.errors import RequestError
from polygpt.model import Model
from polygpt.presets import PRESETS, preset
from polygpt.sharding import (
    ACTIVATION_RULES,
    MESH_AXES,
    PARAMETER_RULES,
    MeshConfig,
    Rules,
    constrain,
    make_mesh,
    placement,
    replicated_axes,
    sharding_of,
    use_mesh,
)

EIGHT = AbstractMesh((1, 2, 2, 2), MESH_AXES)


def test_axes_go_where_the_tables_say():
    spec = sharding_of(("layers", "embed", "heads", "head_dim"), (3, 8, 4, 5), EIGHT).spec
    assert spec == PartitionSpec(None, "fsdp", "tensor", None)
    batch = sharding_of(("batch", None, "embed"), (8, 5, 8), EIGHT, Rules().activations).spec
    assert batch == PartitionSpec(("data", "fsdp", "expert"), None, None)
    for table in (PARAMETER_RULES, ACTIVATION_RULES):
        assert set().union(*table.values()) <= set(MESH_AXES)


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_of_every_preset_has_a_placement(name):
    parameters = Model(preset(name).with_vocab(128)).parameters
    for info, sharding in zip(jax.tree.leaves(parameters), jax.tree.leaves(placement(parameters, EIGHT)), strict=True):
        assert len(sharding.spec) == len(info.shape)
        sharding.shard_shape(info.shape)


def test_a_mesh_axis_splits_one_axis_of_an_array():
    rules = Rules.of(MeshConfig(rules={"embed": "tensor"}))
    spec = sharding_of(("embed", "mlp"), (8, 8), EIGHT, rules.parameters).spec
    assert spec == PartitionSpec("tensor", None)
    spec = sharding_of(("expert", "embed", "mlp"), (4, 8, 8), EIGHT).spec
    assert spec == PartitionSpec("expert", "fsdp", "tensor")


def test_what_cannot_be_split_evenly_is_replicated_and_named():
    parameters = Model(
        preset("gqa_gpt", vocab_size=65, embed_dim=64, attention={"num_heads": 4, "num_kv_heads": 1})
    ).parameters
    specs = placement(parameters, EIGHT)
    assert specs["embedding"].spec == PartitionSpec(None, "fsdp")
    attention = specs["blocks"][0]["attention"]
    assert attention["query"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert attention["key"].spec == PartitionSpec(None, "fsdp", None, None)
    found = {(entry.parameter, entry.axis, entry.length, entry.devices) for entry in replicated_axes(parameters, EIGHT)}
    kv = {(f"blocks.0.attention.{name}", "kv_heads", 1, 2) for name in ("key", "value")}
    assert found == kv | {("embedding", "vocab", 65, 2)}


def test_a_tuple_of_mesh_axes_is_cut_to_those_that_divide():
    mesh = AbstractMesh((2, 2, 1, 2), MESH_AXES)
    assert sharding_of(("batch",), (4,), mesh, Rules().activations).spec == PartitionSpec(("data", "fsdp"))
    assert sharding_of(("batch",), (3,), mesh, Rules().activations).spec == PartitionSpec(None)


def test_rules_are_changed_by_a_configuration():
    rules = Rules.of(MeshConfig(rules={"heads": None, "embed": ["fsdp", "data"]}, activation_rules={"batch": "data"}))
    table = dict(rules.parameters)
    assert (table["heads"], table["embed"], table["mlp"]) == ((), ("fsdp", "data"), ("tensor",))
    assert dict(rules.activations)["batch"] == ("data",)
    assert Rules.of(None) == Rules.of(MeshConfig()) == Rules()
    hash(rules)


def test_placing_an_array_keeps_its_values():
    array = np.arange(12.0).reshape(3, 4)
    placed = jax.device_put(array, sharding_of(("vocab", "embed"), array.shape, make_mesh()))
    np.testing.assert_array_equal(placed, array)


def test_a_mesh_of_other_axes_is_refused():
    with pytest.raises(RequestError, match=r"the mesh has the axes \('x',\)"):
        placement({}, AbstractMesh((1,), ("x",)))


def test_outside_a_mesh_nothing_is_constrained():
    x = np.ones(3)
    assert constrain(x, "batch") is x
    with use_mesh(make_mesh()):
        assert constrain(x, "batch") is x
