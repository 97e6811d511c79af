"""Recipes: each is a run as it stands, opens with its command, and bends to overrides."""

import shlex
from importlib import resources

import pytest

from polygpt.errors import RequestError
from polygpt.presets import preset
from polygpt.recipes import load_recipe, recipe_names, resume_config

RECIPES = ["demo", "shakespeare_char_cpu", "shakespeare_char_gpu"]
FINETUNE = "finetune"  # its model is the one it is given
EVERY = pytest.mark.parametrize("name", RECIPES)


def test_the_recipes_are_these():
    assert recipe_names() == sorted([*RECIPES, FINETUNE])


def opening(name):
    """The comment that a recipe opens with."""
    text = (resources.files("polygpt.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    return text[: text.index("model:")].splitlines()


@EVERY
def test_a_recipe_is_valid_as_it_stands(name):
    config = load_recipe(name)
    assert config.model.vocab_size is None
    assert config.training.steps > 0


def test_finetuning_takes_the_model_it_is_given():
    config = load_recipe(FINETUNE, {"training.initial": "smollm", "model.context_length": 64})
    assert config.model == preset("smollm", context_length=64, param_dtype="float32", compute_dtype="float32")
    assert config.tokenizer.kind == "initial"
    with pytest.raises(RequestError, match=r"brings its own tokenizer; give tokenizer\.kind=initial"):
        load_recipe(FINETUNE, {"training.initial": "smollm", "tokenizer.kind": "byte"})


@pytest.mark.parametrize("name", [*RECIPES, FINETUNE])
def test_a_recipe_opens_with_its_command_which_fits_the_program(name):
    from polygpt.cli import polygpt

    lines = opening(name)
    assert all(line.startswith("#") for line in lines if line)
    command = next(line.lstrip("# ").split("  ")[0] for line in lines if "polygpt " in line)
    program, verb, *words = shlex.split(command)
    assert (program, name in [verb, *words]) == ("polygpt", True)
    polygpt.get_command(None, verb).make_context(verb, words)


@pytest.mark.parametrize("name", RECIPES[1:])
def test_a_published_recipe_states_time_and_score(name):
    text = " ".join(opening(name))
    assert "minute" in text
    assert "xpected" in text


def test_the_shakespeare_recipes_are_nanogpts():
    cpu, gpu = load_recipe("shakespeare_char_cpu"), load_recipe("shakespeare_char_gpu")
    for config, shape in ((cpu, (64, 128, 4, 4, 12, 2000)), (gpu, (256, 384, 6, 6, 64, 5000))):
        model, training = config.model, config.training
        found = (model.context_length, model.embed_dim, model.num_layers, model.attention.num_heads)
        assert (*found, training.batch_size, training.steps) == shape
        assert (training.optimizer.learning_rate, training.optimizer.b2) == (1e-3, 0.99)
        assert (model.norm.bias, model.attention.bias, model.feedforward.bias) == (False, False, False)
    assert (cpu.model.dropout, gpu.model.dropout, gpu.model.attention.dropout) == (0, 0.2, 0.2)


def test_overrides_reach_every_depth():
    config = load_recipe("demo", {"model.num_layers": 3, "training.optimizer": {"kind": "muon"}, "data": {"path": "x"}})
    assert (config.model.num_layers, config.training.optimizer.kind, config.data.path) == (3, "muon", "x")
    assert config.model.embed_dim == load_recipe("demo").model.embed_dim


@pytest.mark.parametrize("kind", [None, "adamw"])
def test_a_learning_rate_is_set_where_no_optimizer_is_named(tmp_path, kind):
    path = tmp_path / "run.yaml"
    optimizer = f", optimizer: {{kind: {kind}}}" if kind else ""
    path.write_text(f"model: {{preset: tiny_large}}\ntraining: {{steps: 1, batch_size: 1{optimizer}}}\n")
    config = load_recipe(str(path), {"training.optimizer.learning_rate": 0.5, "training.schedule.warmup_steps": 3})
    assert (config.training.optimizer.kind, config.training.optimizer.learning_rate) == ("adamw", 0.5)
    assert (config.training.schedule.kind, config.training.schedule.warmup_steps) == ("cosine", 3)


def test_a_preset_is_what_the_rest_of_the_model_changes(tmp_path):
    path = tmp_path / "run.yml"
    path.write_text("model: {preset: gpt, num_layers: 2, norm: rmsnorm}\ntraining: {steps: 1, batch_size: 1}\n")
    config = load_recipe(str(path), {"model.attention.num_heads": 6, "model.norm.eps": 1e-3})
    expected = preset("gpt", num_layers=2, norm={"kind": "rmsnorm", "eps": 1e-3}, attention={"num_heads": 6})
    assert config.model == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("demmo", r"no recipe 'demmo'; did you mean 'demo'\?"),
        ("missing.yaml", r"missing\.yaml: cannot be read \(No such file"),
        ("a/folder", r"a/folder: cannot be read"),
    ],
)
def test_a_recipe_that_is_not_there_is_refused(name, message):
    with pytest.raises(RequestError, match=message):
        load_recipe(name)


def test_a_preset_that_is_not_there_is_refused():
    with pytest.raises(RequestError, match=r"no preset 'gtp2'; did you mean 'gpt2'\?"):
        load_recipe("demo", {"model.preset": "gtp2"})


def test_a_run_goes_on_under_its_own_configuration_or_a_recipes(tiny_run, tiny_files):
    assert resume_config(tiny_run, None, {}).training.steps == 6
    assert resume_config(tiny_run, None, {"training.steps": 9}).training.steps == 9
    assert resume_config(tiny_run, str(tiny_files / "tiny.yaml"), {"training.steps": 8}).training.steps == 8
    with pytest.raises(RequestError, match="no run here"):
        resume_config(tiny_files, None, {})
