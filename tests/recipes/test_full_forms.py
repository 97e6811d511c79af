"""The full forms of the recipes compile: the whole training step, from shapes, for devices that are simulated."""

import json

import pytest

from polygpt.recipes import load_recipe, short_recipes

OPEN = {
    "giant_wikitext2": ["model.vocab_size=50257"],
    "small_bpe": ["data.path=text.txt"],
    "tinystories_cpu": ["data.path=text.txt"],
}  # not known without the data
MESHES = {"charformer_text": ["mesh.data=2", "mesh.fsdp=4"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", short_recipes())
def test_the_step_of_the_full_form_compiles(name, process):
    done = process("plan", name, *OPEN.get(name, []), *MESHES.get(name, []), "--json", timeout=900)
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    config = load_recipe(name, {"data.path": "text.txt"})
    assert plan["devices"] == (8 if name in MESHES else 1)
    assert plan["tokens_per_step"] == config.training.batch_size * config.model.context_length
    assert plan["flops_per_step"] > 0
