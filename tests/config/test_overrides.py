"""KEY=VALUE: how values are read, and how changes are laid over what is there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yaml_trees import KEYS, TREES

from polygpt.config import as_yaml, dotted_to_nested, merge, parse_overrides
from polygpt.errors import RequestError
from polygpt.presets import preset
from polygpt.recipes import load_recipe


def test_overrides_are_dotted_keys_with_yaml_values():
    words = ["model.num_layers=4", "training.lr=3e-4", "data.path=a=b.txt", "x=[1, {y: z}]", "none="]
    assert as_yaml(parse_overrides(words)) == {
        "model.num_layers": 4,
        "training.lr": 3e-4,
        "data.path": "a=b.txt",
        "x": [1, {"y": "z"}],
        "none": None,
    }


@pytest.mark.parametrize("word", ["a.b=.nan", "a.b=.inf", "a.b=-.inf", "a.b=1e999"])
def test_an_override_that_is_no_finite_number_is_refused(word):
    with pytest.raises(RequestError, match=r"^a\.b: a finite number is needed"):
        as_yaml(parse_overrides([word]))


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


def test_the_values_of_a_mapping_are_read_by_their_type():
    sources = "data.sources=[{path: a.txt, weight: 3}, {path: b.txt, name: notes}]"
    data = load_recipe("demo", parse_overrides([sources, "data.stages=[{from_step: 8, weights: {notes: 1e1}}]"])).data
    assert data.stages[0].weights == {"notes": 10.0}
    rules = load_recipe("demo", parse_overrides(["mesh.rules={heads: null, embed: [fsdp, data]}"])).mesh.rules
    assert rules == {"heads": (), "embed": ("fsdp", "data")}


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


def test_an_entry_of_a_list_is_reached_by_its_number():
    base = {"pattern": [{"a": {"x": 1}}, {"b": 2}]}
    assert merge(base, dotted_to_nested({"pattern.0.a.x": 5})) == {"pattern": [{"a": {"x": 5}}, {"b": 2}]}
    assert merge(base, {"pattern": [{}]}) == {"pattern": [{}]}
    with pytest.raises(RequestError, match="no entry 2: the list has 2"):
        merge(base, dotted_to_nested({"pattern.2.b": 5}))


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
