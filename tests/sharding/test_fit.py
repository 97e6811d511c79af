"""What a mesh refuses of a model, and what it replicates."""

import pytest
from jax.sharding import AbstractMesh

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.model import Model
from polygpt.presets import preset
from polygpt.sharding import MESH_AXES, MeshConfig, Rules, Scope, bytes_per_device, check_fit, check_rows, replication

SMALL = {"vocab_size": 65, "embed_dim": 64, "num_layers": 2}


def scope(config):
    return Scope(AbstractMesh(config.shape, MESH_AXES), Rules.of(config))


def parameters(**changes):
    heads = {"num_heads": 4, "num_kv_heads": 2}
    return Model(preset("gqa_gpt", **SMALL, attention=heads, **changes)).parameters


def test_heads_that_do_not_divide_are_refused_with_what_would():
    with pytest.raises(RequestError) as error:
        check_fit(parameters(), scope(MeshConfig(tensor=3)))
    assert "mesh.tensor=3 does not divide the 4 heads of blocks.0.attention" in str(error.value)
    assert "(attention.num_heads); mesh.tensor can be 1, 2 or 4, or mesh.rules.heads= (empty)" in str(error.value)


def test_experts_that_do_not_divide_are_refused_with_what_would():
    model = Model(preset("tiny_moe", num_layers=2, vocab_size=65))
    count = model.config.layers[0].feedforward.num_experts
    with pytest.raises(
        RequestError, match=f"mesh.expert=3 does not divide the {count} experts of blocks.0.feedforward"
    ):
        check_fit(model.parameters, scope(MeshConfig(expert=3)))


def test_fewer_kv_heads_and_an_odd_vocabulary_are_replicated_and_said():
    notes = check_fit(parameters(), scope(MeshConfig(tensor=4)))
    assert notes == [
        "kv_heads (2) cannot be split evenly over tensor 4: blocks.0.attention.key and 1 more replicated along it",
        "vocab (65) cannot be split evenly over tensor 4: embedding replicated along it",
    ]


def test_a_changed_rule_keeps_heads_whole_and_says_so():
    config = MeshConfig(tensor=3, rules={"heads": None, "kv_heads": None})
    assert all("heads" not in note for note in check_fit(parameters(), scope(config)))
    assert "heads (4) stay whole on every device (mesh.rules)" in replication(parameters(), scope(config))


def test_what_training_refuses_is_not_shown_as_replicated():
    first, *rest = replication(parameters(), scope(MeshConfig(tensor=8)))
    assert first.startswith("cannot be trained: mesh.tensor=8 does not divide the 4 heads of blocks.0.attention")
    assert first.count("mesh.tensor can be 1, 2 or 4") == 1
    assert [line.partition(" ")[0] for line in rest] == ["kv_heads", "vocab"]


def test_a_rule_for_an_axis_that_nothing_has_is_refused_or_said():
    with pytest.raises(RequestError, match=r"mesh.rules.embd: no parameter .*; did you mean 'embed'\?"):
        check_fit(parameters(), scope(MeshConfig(data=8, rules={"embd": "fsdp"})))
    with pytest.raises(RequestError, match=r"mesh.rules.batch: only activations .* mesh.activation_rules.batch"):
        check_fit(parameters(), scope(MeshConfig(data=8, rules={"batch": "data"})))
    own = scope(MeshConfig(data=8, activation_rules={"bach": "data"}))
    said = "activation_rules.bach changes nothing unless a part of your own names this axis; did you mean 'batch'?"
    assert check_fit(parameters(), own) == replication(parameters(), own) == [said]


def test_an_activation_is_not_split_twice_over_one_mesh_axis():
    for rules in ({"heads": "data"}, {"batch": ["data", "tensor"]}):
        config = validate(MeshConfig, {"data": 2, "tensor": 2, "activation_rules": rules})
        with pytest.raises(RequestError, match=r"mesh.activation_rules: \w+ cannot be split over '(data|tensor)'"):
            check_fit(parameters(), scope(config))


def test_a_batch_smaller_than_the_data_axes_is_refused():
    own = scope(MeshConfig(data=2, fsdp=2))
    check_rows(8, own, "training.batch_size=8")
    with pytest.raises(
        RequestError, match=r"training.batch_size=3: 3 rows cannot be split evenly over 4 devices .*; 4 can"
    ):
        check_rows(3, own, "training.batch_size=3")
    with pytest.raises(RequestError, match="4 or 8 can"):
        check_rows(6, own, "training.batch_size=6")


def test_bytes_of_a_device_follow_its_shards():
    whole = bytes_per_device(parameters(), scope(MeshConfig()))
    assert whole == Model(preset("gqa_gpt", **SMALL, attention={"num_heads": 4, "num_kv_heads": 2})).num_parameters * 4
    own = bytes_per_device(parameters(), scope(MeshConfig(fsdp=4)))
    assert own / (whole / 4) < 1.03  # biases of hidden units stay whole
    assert bytes_per_device(parameters(), scope(MeshConfig(data=4))) == whole
