"""What fills a slot: a registered kind, or a user's own class by dotted path; mistakes name what is missing."""

import sys

import pytest

from polygpt.config import parse_yaml, to_yaml, validate
from polygpt.errors import RequestError
from polygpt.model import (
    AttentionConfig,
    BlockConfig,
    FeedForwardConfig,
    Model,
    ModelConfig,
    NormConfig,
    PositionConfig,
    attention,
    block,
    feedforward,
    norms,
    positions,
)
from polygpt.presets import preset

SLOTS = {AttentionConfig, BlockConfig, FeedForwardConfig, NormConfig, PositionConfig}

MY_PARTS = """
import jax.numpy as jnp
from flax import nnx
from polygpt.model import AttentionConfig, FeedForwardConfig
from pydantic import PositiveInt

class Wide(FeedForwardConfig):
    factor: PositiveInt = 4

    def build(self, model, init):
        raise NotImplementedError

    def check(self, model):
        if self.factor > 8:
            raise ValueError(f"factor={self.factor} is too much")

class Uncallable(Wide):
    def build(self, model, init):
        return 3

class Forgetful(Wide):
    def build(self, model, init):
        return Pair(init)

class Pair(nnx.Module):
    def __init__(self, init):
        pass

    def __call__(self, x, context, state):
        return x, state

class Loose(Wide):
    def build(self, model, init):
        return Bare()

class Bare(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(3))

class NoPart:
    pass

class Unbuilt(FeedForwardConfig):
    pass

class Stateless(AttentionConfig):
    def build(self, model, init):
        raise NotImplementedError

class Empty(AttentionConfig):
    pass

class Inherits(Wide):
    pass
"""


@pytest.fixture
def my_parts(tmp_path, monkeypatch):
    """A module of a user's own, beside where they work; gives its name."""
    name = f"parts_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MY_PARTS)
    (tmp_path / f"{name}_broken.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    return name


def small(**changes):
    return preset("gpt", **{"num_layers": 2, "embed_dim": 24, "attention.num_heads": 4, "vocab_size": 64, **changes})


def test_a_part_of_the_users_own_is_found_beside_them_and_comes_back_from_yaml(my_parts):
    config = small(feedforward={"kind": f"{my_parts}:Wide", "factor": 3})
    assert (type(config.feedforward).__name__, config.feedforward.factor) == ("Wide", 3)
    assert validate(ModelConfig, parse_yaml(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("{0}:Wyde", {}, r"feedforward: module '{0}' has no 'Wyde'; did you mean 'Wide'\?"),
        ("{0}:NoPart", {}, r"feedforward: '{0}:NoPart' must be a class that derives from .*FeedForwardConfig"),
        ("{0}_no:Wide", {}, r"feedforward: cannot import '{0}_no' of kind '{0}_no:Wide': No module named '{0}_no'"),
        ("{0}_broken:Wide", {}, r"cannot import '{0}_broken' .*a_package_that_is_not_there"),
        (":Wide", {}, r"feedforward: cannot import '' of kind ':Wide'"),
        ("json:", {}, r"feedforward: module 'json' has no ''"),
        ("{0}:Wide", {"factro": 2}, r"feedforward\.factro: no such key; did you mean 'factor'\?"),
        ("{0}:Wide", {"factor": 0}, r"feedforward\.factor: must be greater than 0, not 0"),
        ("{0}:Wide", {"factor": 9}, r"factor=9 is too much"),
        ("{0}:Unbuilt", {}, r"feedforward: '{0}:Unbuilt' lacks 'build' \(see docs/add-a-part\.md\)"),
    ],
)
def test_a_wrong_part_of_the_users_own_is_refused(my_parts, kind, fields, message):
    with pytest.raises(RequestError, match=message.format(my_parts)) as error:
        small(feedforward={"kind": kind.format(my_parts), **fields})
    assert "\n" not in str(error.value)


def test_another_slots_part_does_not_fit(my_parts):
    with pytest.raises(RequestError, match=r"must be a class that derives from .*NormConfig"):
        small(norm={"kind": f"{my_parts}:Wide"})


@pytest.mark.parametrize(("name", "lacks"), [("Stateless", "'init_state'"), ("Empty", "'build' and 'init_state'")])
def test_attention_that_cannot_decode_is_named_with_what_it_lacks(my_parts, name, lacks):
    with pytest.raises(RequestError) as error:
        small(attention={"kind": f"{my_parts}:{name}"})
    assert str(error.value) == f"gpt: attention: '{my_parts}:{name}' lacks {lacks} (see docs/add-a-part.md)"


def test_what_a_part_inherits_is_not_lacking(my_parts):
    assert small(feedforward={"kind": f"{my_parts}:Inherits"}).feedforward.factor == 4


@pytest.mark.parametrize("slot", ["model", "pattern"])
def test_a_part_that_lacks_something_is_refused_wherever_it_stands(my_parts, slot):
    part = {"feedforward": {"kind": f"{my_parts}:Unbuilt"}}
    with pytest.raises(RequestError, match="lacks 'build'"):
        small(**(part if slot == "model" else {"pattern": [part, {}]}))


@pytest.mark.parametrize(
    "registry", [attention.REGISTRY, feedforward.REGISTRY, norms.REGISTRY, positions.REGISTRY, block.REGISTRY]
)
def test_parts_of_the_menus_define_what_their_slot_needs(registry):
    for cls in registry.values():
        base = next(base for base in cls.__mro__ if base in SLOTS)
        assert all(getattr(cls, name) is not getattr(base, name) for name in base.needed), cls


# --- Fields of another kind ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention": {"kind": "linear", "num_heads": 4, "window": 8}},
            "gpt: attention: window=8 does not go with kind=linear, whose state holds all that came before; "
            "use kind=local for a window, or decay=true to forget",
        ),
        ({"attention": {"kind": "local", "num_heads": 4}}, "gpt: attention.window: this key is required"),
        (
            {"feedforward": {"kind": "mlp", "mlp_dim": 8, "num_experts": 4}},
            "gpt: feedforward.num_experts: no such key; choose from: activation, bias, kind, mlp_dim",
        ),
        (
            {"position": {"kind": "learned", "theta": 100.0}},
            "gpt: position.theta: no such key; choose from: kind",
        ),
        (
            {"pattern": [{"attention": {"kind": "linear", "num_heads": 4, "window": 8}}, {}]},
            "gpt: pattern.0.attention: window=8 does not go with kind=linear, whose state holds all that came before; "
            "use kind=local for a window, or decay=true to forget",
        ),
    ],
)
def test_a_field_of_another_kind_is_refused_with_the_mend(changes, message):
    with pytest.raises(RequestError) as error:
        small(**changes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("Uncallable", "callable"), ("Forgetful", "unpack"), ("Loose", r"feedforward\.scale has no logical axes")],
)
def test_a_part_that_does_not_do_what_its_slot_asks_is_named_before_anything_is_compiled(my_parts, kind, reason):
    model = Model(small(feedforward={"kind": f"{my_parts}:{kind}"}))
    with pytest.raises(RequestError, match=reason) as caught:
        model.check()
    assert kind in str(caught.value) or kind == "Loose"
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_of_the_menus_parts_needs_no_check():
    Model(small()).check()
