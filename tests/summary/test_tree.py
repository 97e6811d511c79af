"""The tree of a model's parts: every parameter once, every part in its place, and the layers it serves."""

import jax
import pytest

from polygpt.model import Model
from polygpt.presets import PRESET_VOCAB, PRESETS, preset
from polygpt.summary import model_tree, served_layers


def tree(name="gpt2", **changes):
    return model_tree(Model(preset(name, **changes).with_vocab(PRESET_VOCAB)))


def walk(node):
    yield node
    for child in node.children:
        yield from walk(child)


def find(node, *names):
    for name in names:
        node = next(child for child in node.children if child.name == name)
    return node


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_is_in_the_tree_once(name):
    model = Model(preset(name).with_vocab(PRESET_VOCAB))
    infos = [node.info for node in walk(model_tree(model)) if node.info is not None]
    assert sorted(map(id, infos)) == sorted(map(id, jax.tree.leaves(model.parameters)))
    assert model_tree(model).size == model.num_parameters


@pytest.mark.parametrize(
    ("entry", "period", "layers", "said"),
    [
        (0, 1, 12, "all 12 layers"),
        (0, 1, 1, "layer 0"),
        (1, 2, 2, "layer 1"),
        (0, 2, 32, "layers 0, 2, …, 30 (16 layers)"),
        (1, 3, 8, "layers 1, 4, 7 (3 layers)"),
        (2, 3, 8, "layers 2, 5 (2 layers)"),
    ],
)
def test_the_layers_that_an_entry_serves(entry, period, layers, said):
    assert served_layers(entry, period, layers) == said


def test_a_branch_for_each_entry_of_the_pattern():
    root = tree("tiny_moe")
    even, odd = "layers 0, 2, …, 30 (16 layers)", "layers 1, 3, …, 31 (16 layers)"
    assert [child.name for child in root.children] == ["embedding", "position", even, odd, "final_norm", "head"]
    assert find(root, even, "feedforward").note.startswith(
        "moe mlp_dim=2304 num_experts=8 bias=true capacity_factor=1.1"
    )
    assert find(root, odd, "feedforward").note == "glu mlp_dim=2304"
    assert find(root, even, "feedforward", "router").info.axes == ("layers", "embed", "expert")


@pytest.mark.parametrize(
    ("block", "children"),
    [
        ("pre_norm", ["attention_norm", "attention", "feedforward_norm", "feedforward"]),
        ("parallel", ["norm", "attention", "feedforward"]),
        (
            "sandwich",
            [
                "attention_norm",
                "attention",
                "attention_out_norm",
                "feedforward_norm",
                "feedforward",
                "feedforward_out_norm",
            ],
        ),
    ],
)
@pytest.mark.parametrize("norm", ["rmsnorm", "none"])
def test_a_block_lists_its_parts_those_without_parameters_too(block, children, norm):
    branch = find(tree(block=block, norm=norm), "all 12 layers")
    assert branch.note == block
    assert [child.name for child in branch.children] == children
    assert {child.note for child in branch.children if "norm" in child.name} == {norm}


def test_settings_are_those_that_are_not_defaults():
    root = tree(
        num_layers=1,
        position={"kind": "rope", "scaling": {"kind": "linear", "factor": 2.0}},
        attention={"window": 8, "qk_norm": True, "bias": False},
    )
    assert find(root, "position").note == "rope scaling=(linear factor=2.0)"
    assert find(root, "layer 0", "attention").note == "softmax num_heads=12 window=8 qk_norm=true"
    assert find(root, "layer 0", "attention", "query_norm").info.shape == (1, 64)


@pytest.mark.parametrize(
    ("name", "said"),
    [("gpt2", "tied to the embedding"), ("bigram", "none: the last hidden states are the logits"), ("small", "")],
)
def test_the_head_says_what_it_is(name, said):
    head = find(tree(name), "head")
    assert (head.note, head.info is None) == (said, bool(said))


def test_one_is_a_number_and_true_is_not():
    notes = [node.note for node in walk(tree("giant", **{"attention.qk_norm": True})) if node.name == "attention"]
    assert "num_kv_heads=1" in notes[0]
    assert "qk_norm=true" in notes[0]
