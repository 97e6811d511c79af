"""A mesh on the command line: of models that are shown, evaluated and sampled from."""

import json

import pytest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mesh.tensor=2"], "mesh: tensor 2 is a mesh of 2 devices, but there is 1"),
        (["training.steps=2"], "training.steps: only the mesh can be set here, such as mesh.tensor=4"),
        (["mesh.tensr=2"], "mesh.tensr: no such key; did you mean 'tensor'?"),
    ],
)
@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "the"], ["eval", "--task", "perplexity", "--data", "text.txt"]]
)
def test_a_mesh_that_cannot_be_is_refused(program, run, command, words, message):
    name, *options = command
    ran = program(name, run, *words, *options)
    assert ran.code == 2
    assert message in ran.err
    assert len(ran.err.strip().splitlines()) <= 3


def test_a_mesh_of_one_device_changes_nothing(program, run):
    plain = program("generate", run, "--prompt", "the", "--max-new-tokens", 3)
    assert program("generate", run, "mesh.data=1", "--prompt", "the", "--max-new-tokens", 3).out == plain.out


def test_show_says_what_each_device_holds_and_what_is_replicated(program):
    ran = program("show", "gqa_gpt", "model.vocab_size=64", "mesh.data=2", "mesh.tensor=9", "--json")
    mesh = json.loads(ran.out)["mesh"]
    assert (mesh["devices"], mesh["layout"]) == (18, "data 2 × tensor 9")
    assert [line.split(" cannot")[0] for line in mesh["replicated"]] == ["kv_heads (3)", "mlp (3072)", "vocab (64)"]
    assert "replicated along it" in program("show", "gqa_gpt", "mesh.tensor=9").out


def test_show_tells_the_layout_of_charformer(program):
    out = program("show", "charformer").out
    assert "data 2 × tensor 4" in out
    assert "heads (15) stay whole on every device" in out
    assert "vocab (259) cannot be split evenly over tensor 4" in out
    assert "mesh" not in json.loads(program("show", "gpt", "--json").out)
