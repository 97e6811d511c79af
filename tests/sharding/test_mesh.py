"""The mesh of a configuration, and how it is chosen, written and refused."""

import jax
import pytest

from polygpt.config import merge, parse_overrides, validate
from polygpt.config.overrides import dotted_to_nested
from polygpt.errors import RequestError
from polygpt.presets import preset
from polygpt.sharding import MESH_AXES, MeshConfig, choose_mesh, describe_mesh, make_mesh
from polygpt.training import RunConfig

RUN = {"model": preset("gpt").to_dict(), "training": {"steps": 10, "batch_size": 8}}


def read(*words, base=None):
    fields = merge({**RUN, **({} if base is None else {"mesh": base})}, dotted_to_nested(parse_overrides(words)))
    return validate(RunConfig, fields)


def test_a_mesh_is_read_axis_by_axis_whole_or_as_auto():
    assert read().mesh is None
    assert read("mesh.fsdp=8").mesh == MeshConfig(fsdp=8)
    assert read("mesh={data: 2, tensor: 4}").mesh == MeshConfig(data=2, tensor=4)
    assert read("mesh=auto").mesh == "auto"
    assert read("mesh.fsdp=8", base="auto").mesh == MeshConfig(fsdp=8)
    assert read("mesh=", base={"data": 2}).mesh is None
    config = read("mesh.rules.heads=", "mesh.rules.embed=[fsdp, data]", "mesh.tensor=2")
    assert config.mesh.rules == {"heads": (), "embed": ("fsdp", "data")}
    assert validate(RunConfig, config.to_dict()) == config
    hash(config.mesh)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mesh.model=2", "mesh.model: no such key"),
        ("mesh.data=0", "mesh.data: .*greater than"),
        ("mesh=all", "mesh: a mapping is needed, not 'all': mesh.data=8, say; or mesh=auto"),
        ("mesh.rules.heads=model", "mesh.rules: heads can be .*'data', 'fsdp', 'tensor' or 'expert'.*not over 'model'"),
        ("mesh.rules.heads=3", "mesh.rules: heads can be .*not over 3"),
        ("mesh.rules.embed=[fsdp, fsdp]", "mesh.rules: embed can be .*each named once"),
        ("mesh.activation_rules.batch=[data, data]", "mesh.activation_rules: batch can be .*each named once"),
        ("mesh.rules=3", "mesh.rules: a mapping is needed, not 3"),
    ],
)
def test_a_mistake_in_a_mesh_names_its_key(word, message):
    with pytest.raises(RequestError, match=message):
        read(word)


def test_without_a_mesh_there_is_one_device():
    mesh = make_mesh()
    assert mesh.axis_names == MESH_AXES
    assert mesh.devices.ravel().tolist() == jax.local_devices()[:1]


def test_a_mesh_of_another_number_of_devices_says_which_would_fit():
    one = jax.devices()[:1]
    with pytest.raises(RequestError, match=r"data 2 × tensor 4 is a mesh of 8 devices, but there is 1; .*_count=8"):
        make_mesh(MeshConfig(data=2, tensor=4), one)
    with pytest.raises(RequestError, match=r"but there are 8; 8 would be mesh.fsdp=8 \(mesh=auto"):
        make_mesh(MeshConfig(fsdp=6), one * 8)
    with pytest.raises(RequestError, match=r"8 would be mesh.data=4 mesh.tensor=2 or mesh.data=2 mesh.tensor=4"):
        make_mesh(MeshConfig(data=4, tensor=4), one * 8)


def test_auto_shares_the_batch_between_as_many_devices_as_divide_it():
    assert choose_mesh("auto", 16, 8) == (MeshConfig(data=8), "mesh: data 8")
    chosen, note = choose_mesh("auto", 12, 8)
    assert chosen == MeshConfig(data=6)
    assert note == "mesh: data 6 of 8 devices, since they divide the 12 rows of a batch"
    assert choose_mesh("auto", 7, 4) == (None, "mesh: data 1 of 4 devices, since they divide the 7 rows of a batch")
    assert choose_mesh("auto", 16, 1) == choose_mesh(None, 16, 8) == (None, None)


def test_charformer_is_laid_over_eight_devices_where_there_are_as_many():
    layout = preset("charformer").layout
    assert describe_mesh(layout.shape) == "data 2 × tensor 4"
    assert choose_mesh(None, 16, 8, layout)[0] == choose_mesh("auto", 16, 8, layout)[0] == layout
    assert choose_mesh(MeshConfig(data=2, tensor=4), 16, 8, layout)[0] == layout
    assert choose_mesh(None, 16, 1, layout) == choose_mesh(None, 16, 4, layout) == (None, None)
    assert choose_mesh(MeshConfig(data=8), 16, 8, layout)[0] == MeshConfig(data=8)
