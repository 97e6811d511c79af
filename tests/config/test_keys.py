"""Misspelled, missing and unknown keys: each is named with its path and the mend."""

import json
from typing import Annotated

import pytest
from pydantic import Field

from polygpt.config import Config, check_keys, known_keys, parse_overrides, validate
from polygpt.errors import RequestError
from polygpt.model import ModelConfig
from polygpt.recipes import load_recipe, recipe_fields, recipe_names
from polygpt.training import RunConfig


class Inner(Config):
    size: Annotated[int, Field(gt=0)]


class Outer(Config):
    inner: Inner
    either: Inner | None = None
    entries: Annotated[tuple[Inner, ...], Field(strict=False)] = ()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("modle.num_layers", 1, "modle: no such key; did you mean 'model'?"),
        ("model.num_layer", 1, "model.num_layer: no such key; did you mean 'num_layers'?"),
        ("model.attention.num_head", 1, "model.attention.num_head: no such key; did you mean 'num_heads'?"),
        ("model.pattern", [{"atention": {}}], "model.pattern.0.atention: no such key; did you mean 'attention'?"),
        (
            "model.pattern",
            [{}, {"attention": {"num_haeds": 2}}],
            "model.pattern.1.attention.num_haeds: no such key; did you mean 'num_heads'?",
        ),
        (
            "training.optimizer.learning_rte",
            1e-3,
            "training.optimizer.learning_rte: no such key; did you mean 'learning_rate'?",
        ),
        ("training.samples.evry", 1, "training.samples.evry: no such key; did you mean 'every'?"),
        ("steps", 5, "steps: no such key; did you mean 'training.steps'?"),
        ("num_layers", 5, "num_layers: no such key; did you mean 'model.num_layers'?"),
        ("zzz", 5, "zzz: no such key; choose from: data, expected, mesh, model, tokenizer, training"),
        ("model.norm.kind", "rmsnrm", "model.norm: no kind 'rmsnrm'; did you mean 'rmsnorm'?"),
        ("model.norm", 5, "model.norm: a mapping with a 'kind' is needed here, not 5"),
        ("model.norm", {}, None),
        ("data.path", 5, "data.path: must be a valid string, not 5"),
        ("data.path", [], "data.path: it must not be empty, not []"),
        ("model.pattern", 5, "model.pattern: a list is needed, not 5"),
        ("model", 5, "model: a mapping is needed, not 5"),
        ("training.seed", 2**32, "training.seed: must be less than 4294967296, not 4294967296"),
    ],
)
def test_a_mistake_is_named_with_its_path_and_mend(key, value, message):
    if message is None:
        assert load_recipe("demo", {key: value}) == load_recipe("demo")
        return
    with pytest.raises(RequestError) as error:
        load_recipe("demo", {key: value})
    assert str(error.value) == message


def test_known_keys_refuse_what_validation_refuses_in_the_same_words():
    keys = known_keys(RunConfig)
    assert json.loads(json.dumps(keys)) == keys
    for key, value in [
        ("model.attention.num_head", 1),
        ("model.pattern", [{}, {"attention": {"num_haeds": 2}}]),
        ("model.pattern", [{"atention": {}}]),
        ("training.samples.evry", 1),
        ("training.optimizer.learning_rte", 1e-3),
        ("steps", 5),
        ("model.norm.kind", "rmsnrm"),
        ("model.norm", "rmsnrm"),
        ("training.steps", "abc"),
        ("training.steps", 1.5),
        ("training.steps", 0),
        ("training.steps", 2**31),
        ("training.steps", True),
        ("training.seed", -1),
        ("training.remat", "blocks"),
        ("training.trackers", ["tensorboard", "wandbee"]),
        ("training.eval_every", -1),
        ("training.eval_batches", "all"),
        ("training.samples.top_p", 1.5),
        ("training.samples.prompts", [1]),
        ("training.optimizer.learning_rate", 0.0),
        ("training.optimizer.learning_rate", "fast"),
        ("model.attention.num_heads", 0),
        ("model.dropout", 2.0),
        ("model.scan_layers", "perhaps"),
        ("model.pattern", [{"attention": {"num_heads": "two"}}]),
        ("data.path", ""),
        ("data.path", 7),
        ("data.validation_fraction", 1.0),
        ("data.workers", None),
        ("tokenizer.kind", "bpee"),
    ]:
        with pytest.raises(RequestError) as expected:
            load_recipe("demo", {key: value})
        with pytest.raises(RequestError) as found:
            check_keys(keys, recipe_fields("demo", {key: value}))
        assert str(found.value) == str(expected.value)
    for name in recipe_names():
        check_keys(keys, recipe_fields(name))
    fine = [
        "model.pattern=[{attention: {window: 8}}, {norm: layernorm}]",
        "model.norm=a.b:C",
        "training.evaluations=[]",
        "training.eval_every=0.1",
        "training.clip_norm=",
        "training.optimizer.learning_rate=1e3",
        "training.samples.prompts=[1, '2']",
        "data.path=[a.txt, 7]",
        "data.text_key=1e3",
        "data.stride=null",
        "model.scan_layers=true",
    ]
    check_keys(keys, recipe_fields("demo", parse_overrides(fine)))


def test_three_mistakes_are_told_and_the_rest_counted():
    keys = {f"model.wrong{i}": i for i in range(5)}
    with pytest.raises(RequestError, match=r"\(and 2 more\)$") as error:
        load_recipe("demo", keys)
    assert len(str(error.value).splitlines()) == 3


def test_a_missing_key_is_named():
    with pytest.raises(RequestError, match=r"^inner\.size: this key is required$"):
        validate(Outer, {"inner": {}})


def test_a_part_that_is_missing_is_named_with_its_kinds():
    with pytest.raises(RequestError, match=r"(?m)^norm: this key is required; choose from: layernorm, rmsnorm, "):
        validate(ModelConfig, {"context_length": 8, "position": "rope"})


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"inner": {"size": 1}, "either": {"sise": 1}}, "either.sise"),
        ({"inner": {"size": 1}, "entries": [{"size": 1}, {"size": 1, "sise": 1}]}, "entries.1.sise"),
    ],
)
def test_the_nearest_key_is_found_within_options_and_lists(data, path):
    with pytest.raises(RequestError, match=f"{path}: no such key; did you mean 'size'") as error:
        validate(Outer, data)
    assert "|" not in str(error.value)
