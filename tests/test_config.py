"""Configuration: YAML 1.2, overrides, and errors that name the key and the mend."""

import json
import math
from typing import Annotated

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field

from polygpt.config import (
    Config,
    as_yaml,
    check_keys,
    dotted_to_nested,
    known_keys,
    merge,
    parse_overrides,
    parse_yaml,
    read_yaml,
    to_yaml,
    validate,
)
from polygpt.errors import RequestError
from polygpt.model import ModelConfig
from polygpt.presets import PRESETS, preset
from polygpt.recipes import load_recipe, recipe_fields, recipe_names
from polygpt.training import RunConfig

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
KEYS = st.text("abcdefghij_", min_size=1, max_size=4)
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


def small(**changes):
    return preset("gpt", **{"num_layers": 2, "embed_dim": 24, "attention.num_heads": 4, "vocab_size": 64, **changes})


# --- YAML ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("3E4", 3e4),
        ("0o17", 15),
        ("017", 17),
        (".5", 0.5),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("null", None),
        ("1:30", "1:30"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(text)
    assert (type(found), found) == (type(value), value)


def test_a_key_that_comes_twice_is_refused_with_its_line():
    with pytest.raises(RequestError, match=r"here line 3: .*duplicate key \"steps\""):
        parse_yaml("steps: 1\nseed: 2\nsteps: 3\n", "here")


@pytest.mark.parametrize("text", ["[1", "a: b: c", "!!python/object:os.system ls", "\x00", "&a [*b]", "\t- x: y\n z"])
def test_what_is_not_yaml_is_refused_in_one_line(text):
    with pytest.raises(RequestError, match=r"^here") as error:
        parse_yaml(text, "here")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"- a\n- b\n", "a mapping is needed, not list"), (b"a: \xff", "not UTF-8"), (b"", "not NoneType")],
)
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path, data, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    with pytest.raises(RequestError, match=rf"run\.yaml: .*{message}"):
        read_yaml(path)


@pytest.mark.parametrize("name", ["missing.yaml", ""])
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path, name):
    with pytest.raises(RequestError, match="cannot be read"):
        read_yaml(tmp_path / name)


@settings(deadline=None, max_examples=50)
@example({"a": "\x85 \u2028\ufeff\r\n", "b": "é: 🙂 #x", "c": ["1e-3", "null", "yes", "", " "]})
@given(st.dictionaries(KEYS, TREES, max_size=4))
def test_anything_comes_back_from_yaml(tree):
    assert parse_yaml(to_yaml(tree)) == tree


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_back_from_its_yaml(name):
    config = preset(name)
    again = validate(ModelConfig, parse_yaml(to_yaml(config)))
    assert again == config
    assert hash(again) == hash(config)


# --- Numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["dropout", "init_std", "norm.eps", "attention.dropout", "num_layers", "vocab_size"])
def test_nan_and_infinity_are_refused_everywhere(key, value):
    with pytest.raises(RequestError, match=rf"^model\.{key}|^gpt: {key}"):
        small(**{key: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_infinity_is_refused_where_a_number_has_no_upper_bound(value):
    with pytest.raises(RequestError, match=r"^gpt: position\.theta: must be a finite number"):
        small(position={"kind": "rope", "theta": value})
    with pytest.raises(RequestError, match=r"^training\.clip_norm: must be a finite number"):
        load_recipe("demo", {"training": {"clip_norm": value}})


@pytest.mark.parametrize("word", ["a.b=.nan", "a.b=.inf", "a.b=-.inf", "a.b=1e999"])
def test_an_override_that_is_no_finite_number_is_refused(word):
    with pytest.raises(RequestError, match=r"^a\.b: a finite number is needed"):
        as_yaml(parse_overrides([word]))


@pytest.mark.parametrize("value", ["4", 4.0, True])
def test_types_are_not_bent(value):
    with pytest.raises(RequestError, match="num_layers: must be a valid integer"):
        small(num_layers=value)


# --- Overrides ----------------------------------------------------------------------------------------------


def test_overrides_are_dotted_keys_with_yaml_values():
    words = ["model.num_layers=4", "training.lr=3e-4", "data.path=a=b.txt", "x=[1, {y: z}]", "none="]
    assert as_yaml(parse_overrides(words)) == {
        "model.num_layers": 4,
        "training.lr": 3e-4,
        "data.path": "a=b.txt",
        "x": [1, {"y": "z"}],
        "none": None,
    }


@pytest.mark.parametrize("text", ["*.txt", "**/*.jsonl.gz", "@home", "%x", "&y", "`z`"])
def test_a_glob_is_text(text):
    assert parse_overrides([f"data.path={text}"]) == {"data.path": text}


PATHS = ["corpus #2", "[1].txt", "{a}.txt", "a: b.txt", "1e3", "null.txt", "yes", "a\nb", " c", "*"]


@pytest.mark.parametrize("text", PATHS)
def test_a_path_is_the_text_that_was_typed(text):
    assert load_recipe("demo", parse_overrides([f"data.path={text}"])).data.path == text
    prompts = load_recipe("demo", parse_overrides([f"training.samples.prompts=[a, '{text}']"])).training.samples.prompts
    assert prompts == ("a", text.replace("\n", " "))  # YAML folds a line break within quotes


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("data.path=[1e3, 'b c', \"d #e\"]", ("1e3", "b c", "d #e")),
        ("data.path='quoted'", "quoted"),
        ("training.initial=null", None),
        ("data.stride=1e1", "data.stride: must be a valid integer, not 10.0"),
        ("data.stride=null", None),
        ("data.stride=x y #z", "data.stride: must be a valid integer, not 'x y'"),
        ("tokenizer={kind: file, path: 1e3}", "1e3"),
        ("training.clip_norm=1e3", 1000.0),
        ("training.samples.prompts=[\"'x'\", 12]", ("'x'", "12")),
        ("model.attention.window=null", None),
    ],
)
def test_the_fields_type_decides_how_a_value_is_read(word, value):
    key = word.partition("=")[0]
    if isinstance(value, str) and value.startswith(key):
        with pytest.raises(RequestError, match=f"^{value}$"):
            load_recipe("demo", parse_overrides([word]))
        return
    found = load_recipe("demo", parse_overrides([word]))
    for step in {"tokenizer": "tokenizer.path"}.get(key, key).split("."):
        found = getattr(found, step)
    assert found == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps"], "'steps': settings are written key=value"),
        (["=5"], "'=5': settings are written key=value"),
        (["a=1", "b=2", "a=3"], r"a: given twice \('1' and '3'\)"),
        (["a={b: 1, b: 2}"], "a line 1: found duplicate key"),
    ],
)
def test_a_wrong_override_is_refused(words, message):
    with pytest.raises(RequestError, match=message):
        parse_overrides(words)


@pytest.mark.parametrize("keys", [["model", "model.num_layers"], ["model.num_layers", "model"]])
def test_a_key_below_a_plain_value_clashes_in_either_order(keys):
    with pytest.raises(RequestError, match=r"^model=5 and model\.num_layers=5 do not go together; keep one"):
        dotted_to_nested(dict.fromkeys(keys, 5))


def test_a_kind_with_a_field_of_it_shows_the_mapping():
    with pytest.raises(RequestError, match=r"; write model\.norm=\{kind: rmsnorm, eps: 1e-6\}$"):
        dotted_to_nested(parse_overrides(["model.norm=rmsnorm", "model.norm.eps=1e-6"]))


def test_a_kind_that_is_named_twice_shows_no_mapping():
    with pytest.raises(RequestError, match=r"do not go together; both name the kind: keep one of the two$"):
        dotted_to_nested(parse_overrides(["model.norm=rmsnorm", "model.norm.kind=layernorm"]))


@pytest.mark.parametrize("turn", [1, -1])
def test_a_key_within_a_given_mapping_is_laid_over_it_in_either_order(turn):
    changes = {"optimizer": {"kind": "muon", "b1": 0.5}, "optimizer.b1": 0.8}
    assert dotted_to_nested(dict(list(changes.items())[::turn])) == {"optimizer": {"kind": "muon", "b1": 0.8}}


def test_mappings_of_one_kind_merge_and_of_another_are_replaced():
    base = {"norm": {"kind": "rmsnorm", "eps": 1e-3}, "layers": [1, 2], "seed": 0}
    assert merge(base, {"norm": {"eps": 1e-4}, "layers": [3]}) == {
        "norm": {"kind": "rmsnorm", "eps": 1e-4},
        "layers": [3],
        "seed": 0,
    }
    assert merge(base, {"norm": {"kind": "rmsnorm"}})["norm"] == base["norm"]
    assert merge(base, {"norm": {"kind": "layernorm"}})["norm"] == {"kind": "layernorm"}


def changed(*words, name="demo"):
    return load_recipe(name, parse_overrides(words))


def test_another_kind_given_field_by_field_keeps_what_both_share():
    attention = changed("model.attention.kind=local", "model.attention.window=16").model.attention
    assert (attention.kind, attention.num_heads, attention.num_kv_heads, attention.window) == ("local", 4, 2, 16)
    assert changed("model.attention.kind=linear").model.attention.num_heads == 4
    assert changed("model.feedforward.kind=mlp").model.feedforward.mlp_dim == 352
    config = preset("vgpt", **{"attention.kind": "local", "attention.window": 16})  # vgpt's differ from gpt's
    assert (config.attention.num_heads, config.attention.bias, config.attention.dropout) == (12, True, 0.1)


def test_another_kind_given_whole_has_its_own_defaults():
    config = preset("gpt", attention={"kind": "local", "num_heads": 12, "window": 16})
    assert not config.attention.bias
    with pytest.raises(RequestError, match=r"^model\.attention\.num_heads: this key is required$"):
        changed("model.attention={kind: local, window: 16}")


def test_another_optimizer_keeps_no_learning_rate():
    assert changed("training.optimizer.kind=adamw").training.optimizer.learning_rate == 3e-4


def test_a_base_without_a_kind_keeps_what_it_says():
    assert merge({"vocab_size": 500}, {"kind": "bpe"}) == {"vocab_size": 500, "kind": "bpe"}
    assert merge({"norm": "rmsnorm"}, {"norm": {"eps": 1.0}}) == {"norm": {"kind": "rmsnorm", "eps": 1.0}}


@given(st.dictionaries(KEYS, TREES, max_size=3), st.dictionaries(KEYS, TREES, max_size=3))
def test_what_changes_say_holds_after_a_merge(base, changes):
    before = (repr(base), repr(changes))
    merged = merge(base, changes)
    assert merge(merged, changes) == merged
    assert set(merged) == set(base) | set(changes)
    assert (repr(base), repr(changes)) == before


def test_replace_gives_a_validated_copy():
    config = small()
    changed = config.replace(num_layers=3, **{"attention.num_heads": 6})
    assert (changed.num_layers, changed.attention.num_heads) == (3, 6)
    assert (config.num_layers, config.attention.num_heads) == (2, 4)
    with pytest.raises(RequestError, match="not divisible"):
        config.replace(embed_dim=25)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        small().num_layers = 3


# --- Keys ---------------------------------------------------------------------------------------------------


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


class Inner(Config):
    size: Annotated[int, Field(gt=0)]


class Outer(Config):
    inner: Inner
    either: Inner | None = None
    entries: Annotated[tuple[Inner, ...], Field(strict=False)] = ()


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


@pytest.mark.parametrize("seed", [-1, 2**32, 2**80, 1.0])
def test_a_seed_is_one_that_jax_tells_apart(seed):
    with pytest.raises(RequestError, match=r"training\.seed"):
        load_recipe("demo", {"training.seed": seed})


def test_an_entry_of_a_list_is_reached_by_its_number():
    base = {"pattern": [{"a": {"x": 1}}, {"b": 2}]}
    assert merge(base, dotted_to_nested({"pattern.0.a.x": 5})) == {"pattern": [{"a": {"x": 5}}, {"b": 2}]}
    assert merge(base, {"pattern": [{}]}) == {"pattern": [{}]}
    with pytest.raises(RequestError, match="no entry 2: the list has 2"):
        merge(base, dotted_to_nested({"pattern.2.b": 5}))


def test_yaml_has_no_blanks_at_the_ends_of_lines_but_those_of_strings():
    long = {"part": {f"a_rather_long_key_{i}": None for i in range(9)}, "text": "a  \nb " * 40}
    text = to_yaml({"part": long["part"]})
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    assert parse_yaml(text) == {"part": long["part"]}
    assert parse_yaml(to_yaml(long)) == long
