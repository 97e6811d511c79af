"""YAML 1.2: what is read, what is written, and what is refused."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from yaml_trees import KEYS, TREES

from polygpt.config import parse_yaml, read_yaml, to_yaml, validate
from polygpt.errors import RequestError
from polygpt.model import ModelConfig
from polygpt.presets import PRESETS, preset


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


def test_yaml_has_no_blanks_at_the_ends_of_lines_but_those_of_strings():
    long = {"part": {f"a_rather_long_key_{i}": None for i in range(9)}, "text": "a  \nb " * 40}
    text = to_yaml({"part": long["part"]})
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    assert parse_yaml(text) == {"part": long["part"]}
    assert parse_yaml(to_yaml(long)) == long
