"""Recipes: each is a run as it stands, opens with its command, and bends to overrides."""

import re
import shlex
from importlib import resources

import pytest

from polygpt.config import parse_overrides
from polygpt.errors import RequestError
from polygpt.presets import preset
from polygpt.recipes import load_recipe, recipe_names, resume_config, short_recipes
from polygpt.summary import summary
from polygpt.training import Evaluated, Note, Sampled, Stepped, train

PUBLISHED = [
    "charformer_text",
    "giant_wikitext2",
    "gpt2_fineweb_edu",
    "gpt3_medium_rope",
    "modular_text",
    "small_bpe",
    "smollm_360m",
    "tiny_large_tinystories",
    "tiny_moe",
    "tiny_moe_2",
    "tiny_moe_3",
]
WITH_SHORT_FORM = [*PUBLISHED, "tinystories_cpu"]
RECIPES = ["demo", "own_text", "shakespeare_char_cpu", "shakespeare_char_gpu", *WITH_SHORT_FORM]
FINETUNE = "finetune"  # its model is the one it is given
LEFT_OPEN = ("own_text", "small_bpe", "tinystories_cpu")
REQUIRED = {name: {"data.path": "text.txt"} for name in LEFT_OPEN}  # what a recipe leaves to the user
EVERY = pytest.mark.parametrize("name", RECIPES)


def test_the_recipes_are_these():
    assert recipe_names() == sorted([*RECIPES, FINETUNE])


def opening(name):
    """The comment that a recipe opens with."""
    text = (resources.files("polygpt.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    return text[: text.index("model:")].splitlines()


@EVERY
def test_a_recipe_is_valid_as_it_stands(name):
    config = load_recipe(name, REQUIRED.get(name))
    assert config.training.steps > 0
    if config.tokenizer.kind == "bpe":
        assert config.model.vocab_size is None


@pytest.mark.parametrize("name", WITH_SHORT_FORM)
def test_a_short_form_reads_what_every_machine_has_and_keeps_what_is_special_about_the_recipe(name):
    config, short = load_recipe(name, REQUIRED.get(name)), load_recipe(name, short=True)
    assert short.data.path == "builtin"
    assert short.tokenizer.kind in ("bpe", "byte")
    for part in ("attention", "position", "norm", "feedforward"):
        assert getattr(short.model, part).kind == getattr(config.model, part).kind
    kinds = [[entry.feedforward and entry.feedforward.kind for entry in run.model.pattern] for run in (short, config)]
    assert kinds[0] == kinds[1]
    assert short.training.optimizer.kind == config.training.optimizer.kind
    assert short.training.schedule.kind == config.training.schedule.kind
    assert (short.training.accumulation_steps > 1) == (config.training.accumulation_steps > 1)
    assert load_recipe(name, {"training.steps": 7}, short=True).training.steps == 7


def test_only_some_recipes_have_a_short_form():
    assert short_recipes() == WITH_SHORT_FORM
    with pytest.raises(RequestError, match=r"^demo has no short form; these have one: charformer_text, giant"):
        load_recipe("demo", short=True)


# Tokens a step, context, and what the learning rate does: the published runs.
RUNS = {
    "giant_wikitext2": (None, 257, ("cosine", 1e-3, 500)),
    "gpt2_fineweb_edu": (2**19, 1024, ("cosine", 1.8e-3, 715)),
    "gpt3_medium_rope": (2**19, 1024, ("cosine", 1.8e-3, 3575)),
    "smollm_360m": (2**18, 2048, ("trapezoid", 3e-3, 5000)),
    "tiny_moe": (2**19, 2048, ("trapezoid", 6e-4, 2500)),
    "tiny_moe_2": (2**18, 2048, ("inverse_sqrt", 1e-3, 0.01)),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_recipes_are_the_published_runs(name):
    config = load_recipe(name)
    batch, context, (kind, rate, warmup) = RUNS[name]
    training = config.training
    assert config.model.context_length == context
    assert batch in (None, training.batch_size * context)
    assert (training.schedule.kind, training.schedule.warmup_steps) == (kind, warmup)
    assert (training.optimizer.learning_rate, training.optimizer.b2) == (rate, 0.95)
    assert (training.optimizer.weight_decay, training.clip_norm) == (0.1, 1.0)


def flops_of(name):
    """What the full form computes, from its model and its tokens."""
    config = load_recipe(name, REQUIRED.get(name))
    vocab = {"giant_wikitext2": 50257, "gpt3_medium_rope": 50304}.get(name, config.tokenizer.vocab_size)
    model = config.model if config.model.vocab_size else config.model.with_vocab(vocab)
    tokens = config.training.steps * config.training.batch_size * model.context_length
    return summary(model, config.training)["flops_per_token"] * tokens


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_cost_that_a_recipe_states_is_that_of_its_model_and_its_tokens(name):
    flops = flops_of(name)
    stated = re.search(
        r"(\S+) FLOPs: ([\d.,]+) (minute|hour)s? of an H100 at 40 % utilisation", " ".join(opening(name))
    )
    assert float(stated[1]) == pytest.approx(flops, rel=0.05)
    seconds = float(stated[2].replace(",", "")) * {"minute": 60, "hour": 3600}[stated[3]]
    assert seconds == pytest.approx(max(flops / (0.4 * 989e12), 60), rel=0.3)


def test_the_story_teller_states_its_cost_on_two_cores_and_holds_out_whole_stories():
    stated = re.search(r"(\S+) FLOPs: 20 minutes on 2 CPU cores", " ".join(opening("tinystories_cpu")))
    assert float(stated[1]) == pytest.approx(flops_of("tinystories_cpu"), rel=0.05)
    full, short = load_recipe("tinystories_cpu", {"data.path": "text.txt"}), load_recipe("tinystories_cpu", short=True)
    for config in (full, short):
        assert config.data.split == "document"
        assert config.training.samples.every > 0
        assert "Once upon a time" in config.training.samples.prompts
    assert full.expected is None
    assert short.expected.seeds == 5


@pytest.mark.parametrize("name", short_recipes())
def test_every_short_form_has_a_band_from_five_seeds_and_says_it(name):
    expected = load_recipe(name, short=True).expected
    assert expected.seeds >= 5
    assert 0 < expected.tolerance < 0.1 * expected.val_loss
    assert f"{expected.val_loss:.2f} ± {expected.tolerance:.2f} nats a token" in " ".join(opening(name))


def test_finetuning_takes_the_model_it_is_given():
    given = {"training.initial": "smollm", "data.path": "text.txt"}
    config = load_recipe(FINETUNE, {**given, "model.context_length": 64})
    assert config.model == preset("smollm", context_length=64, param_dtype="float32", compute_dtype="float32")
    assert config.tokenizer.kind == "initial"
    with pytest.raises(RequestError, match=r"brings its own tokenizer; give tokenizer\.kind=initial"):
        load_recipe(FINETUNE, {**given, "tokenizer.kind": "byte"})


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            FINETUNE,
            {},
            r"^finetune: training\.initial is required \(the model to start from: .*\); add training.initial=MODEL$",
        ),
        (FINETUNE, {"data.path": "a.txt"}, r"^finetune: training\.initial is required"),
        (
            FINETUNE,
            {"training.initial": "smollm"},
            r"^finetune: data\.path is required \(the text to train on: .*\); add data.path=FILE$",
        ),
        ("own_text", {"training.steps": 3}, r"^own_text: data\.path is required"),
    ],
)
def test_what_a_recipe_leaves_to_the_user_is_named_where_it_is_missing(name, given, message):
    with pytest.raises(RequestError, match=message):
        load_recipe(name, given)


def test_a_model_that_is_called_like_the_placeholder_can_be_named():
    with pytest.raises(RequestError, match="no model 'MODEL'"):
        load_recipe(FINETUNE, {"training.initial": "MODEL", "data.path": "FILE"})


@pytest.mark.parametrize("name", [*RECIPES, FINETUNE])
def test_a_recipe_opens_with_its_command_which_fits_the_program(name):
    from polygpt.cli import polygpt

    lines = opening(name)
    assert all(line.startswith("#") for line in lines if line)
    command = next(line.lstrip("# ").split("  ")[0] for line in lines if "polygpt " in line)
    program, verb, *words = shlex.split(command)
    assert (program, name in [verb, *words]) == ("polygpt", True)
    polygpt.get_command(None, verb).make_context(verb, words)


def test_the_recipe_for_a_text_of_ones_own_scales_with_its_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f"Line {n} says that {n} times {n} is {n * n}, and nothing more." for n in range(300)]
    (tmp_path / "notes.txt").write_text("\n".join(lines))
    shape = {"model.embed_dim": 16, "model.num_layers": 1, "model.context_length": 32, "model.feedforward.mlp_dim": 16}
    small = {**shape, "tokenizer.vocab_size": 300, "training.samples.max_new_tokens": 4, "training.log_every": 1}
    events = []
    train(
        load_recipe("own_text", {"data.path": "notes.txt", "training.steps": 8, **small}),
        "run",
        listeners=[events.append],
    )
    assert [event.step for event in events if isinstance(event, Evaluated)] == [2, 4, 6, 8]
    assert sorted({event.step for event in events if isinstance(event, Sampled)}) == [2, 4, 6, 8]
    rates = [event.learning_rate for event in events if isinstance(event, Stepped)]
    assert rates.index(max(rates)) in (0, 1)
    notes = " ".join(event.text for event in events if isinstance(event, Note))
    assert "of 1 document to train on" in notes
    held_out = "\n".join(lines)[-len("\n".join(lines)) // 10 :]
    prompts = {event.prompt for event in events if isinstance(event, Sampled)}
    assert len(prompts) == 2
    assert [prompt for prompt in prompts if prompt not in held_out or not prompt.startswith("Line ")] == []


@pytest.mark.parametrize("name", ["shakespeare_char_cpu", "shakespeare_char_gpu"])
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


@pytest.mark.parametrize("name", ["demo", "own_text", "shakespeare_char_cpu", "small_bpe", "gpt2_fineweb_edu"])
def test_a_tokenizers_place_takes_the_place_of_the_recipes_tokenizer(name):
    for given in (["tokenizer.path=folder"], ["tokenizer={path: folder}"]):
        tokenizer = load_recipe(name, parse_overrides([*given, "data.path=x"])).tokenizer
        assert (tokenizer.kind, tokenizer.path, tokenizer.name) == ("file", "folder", None)
    tokenizer = load_recipe(name, parse_overrides(["tokenizer.name=owner/name", "data.path=x"])).tokenizer
    assert (tokenizer.kind, tokenizer.path, tokenizer.name) == ("hf", None, "owner/name")


def test_a_tokenizers_place_that_is_null_changes_nothing():
    tokenizer = load_recipe("shakespeare_char_cpu", parse_overrides(["tokenizer.path=null"])).tokenizer
    assert tokenizer.kind == "char"
