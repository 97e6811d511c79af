"""Typed, frozen configurations: values that are refused, and copies."""

import math

import pytest

from polygpt.errors import RequestError
from polygpt.presets import preset
from polygpt.recipes import load_recipe


def small(**changes):
    return preset("gpt", **{"num_layers": 2, "embed_dim": 24, "attention.num_heads": 4, "vocab_size": 64, **changes})


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


@pytest.mark.parametrize("value", ["4", 4.0, True])
def test_types_are_not_bent(value):
    with pytest.raises(RequestError, match="num_layers: must be a valid integer"):
        small(num_layers=value)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**80, 1.0])
def test_a_seed_is_one_that_jax_tells_apart(seed):
    with pytest.raises(RequestError, match=r"training\.seed"):
        load_recipe("demo", {"training.seed": seed})


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
