"""The model's configuration: what fits together and what is refused before anything is built."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygpt.config import parse_yaml, to_yaml, validate
from polygpt.errors import RequestError
from polygpt.model import ModelConfig

MOE = {"kind": "moe", "mlp_dim": 8, "num_experts": 4}
SOFT = {"kind": "soft_moe", "mlp_dim": 8, "num_experts": 3, "slots_per_expert": 2}
BLOCKWISE = {**SOFT, "kind": "causal_soft_moe"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embed_dim": 65}, ("embed_dim=65", "num_heads=4", "head_dim")),
        ({"attention": {"num_kv_heads": 3}}, ("num_heads=4", "num_kv_heads must be 1, 2 or 4, not 3")),
        ({"attention": {"head_dim": 5}}, ("head_dim=5", "rope")),
        ({"embed_dim": 15, "attention": {"head_dim": 4}, "position": "sinusoidal"}, ("embed_dim=15", "odd")),
        ({"pattern": [{}, {}, {}]}, ("pattern", "num_layers=2")),
        ({"pattern": []}, ("pattern",)),
        ({"embed_dim": None}, ("embed_dim",)),
        ({"head": "none"}, ("embed_dim=16", "vocab_size=37")),
        ({"attention": None}, ("attention",)),
        ({"attention": {"implementation": "cudnn"}}, ("cudnn", "float32")),
        ({"compute_dtype": "bfloat16", "attention": {"implementation": "cudnn", "window": 4}}, ("cudnn", "window")),
        ({"position": "alibi", "attention": {"implementation": "pallas"}}, ("pallas", "alibi")),
        ({"attention": {"kind": "linear", "num_heads": 4, "window": 8}}, ("window=8", "kind=linear", "local")),
        ({"position": "alibi", "attention": {"kind": "linear", "num_heads": 4}}, ("alibi", "linear", "decay")),
        ({"attention": {"kind": "local", "num_heads": 4}}, ("attention.window", "required")),
        ({"attention": {"window": 0}}, ("attention.window", "0")),
        ({"position": {"kind": "rope", "fraction": 0.3}}, ("head_dim=4", "fraction=0.3")),
        ({"position": {"scaling": {"kind": "yarn", "factor": 2.0}}}, ("scaling.original_context_length", "required")),
        ({"position": {"scaling": {"kind": "linear", "factor": 0.5}}}, ("scaling.factor", "0.5")),
        ({"position": {"scaling": {"kind": "dynamic", "factor": 2.0}}}, ("dynamic", "yarn")),
        ({"feedforward": {**MOE, "top_k": 5}}, ("top_k=5", "num_experts=4")),
        ({"feedforward": {**MOE, "capacity_factor": 0.05}}, ("capacity_factor=0.05", "num_experts=4", "dropless")),
        ({"feedforward": {**SOFT, "slots_per_expert": 0}}, ("slots_per_expert", "0")),
        (
            {"feedforward": {**SOFT, "kind": "causal_soft_moe", "block_size": 24}},
            ("block_size=24", "context_length=24"),
        ),
        ({"block": "pre"}, ("pre", "pre_norm")),
        ({"embed_scale": 0.0}, ("embed_scale",)),
        ({"feedforward": {"kind": "glu", "mlp_dim": 8, "activation": "swish"}}, ("activation", "silu")),
        ({"dropout": 1.0}, ("dropout",)),
        ({"num_layers": True}, ("num_layers",)),
        ({"norm": {"kind": "rmsnorm", "epsilon": 1e-5}}, ("norm.epsilon", "eps")),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, words, tiny_config):
    with pytest.raises(RequestError) as caught:
        tiny_config(**changes)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 3


def test_layers_cycle_through_the_pattern(tiny_config):
    config = tiny_config(num_layers=5, pattern=[{"feedforward": {"kind": "mlp", "mlp_dim": 8}}, {}])
    assert [layer.feedforward.kind for layer in config.layers] == ["mlp", "glu", "mlp", "glu", "mlp"]


def test_an_entry_without_a_kind_changes_fields_of_the_models_part(tiny_config):
    config = tiny_config(pattern=[{"attention": {"num_kv_heads": 1}}, {}])
    assert [layer.attention.kv_heads for layer in config.layers] == [1, 2]
    assert config.layers[0].attention.num_heads == 4


def test_an_entry_with_a_kind_replaces_the_part(tiny_config):
    config = tiny_config(pattern=[{"attention": {"kind": "softmax", "num_heads": 2}}, {}])
    assert config.layers[0].attention.kv_heads == 2


@pytest.mark.parametrize("theta", [1e-4, 10000, 10000.0])
def test_theta_may_be_given_as_its_inverse(theta, tiny_config):
    assert tiny_config(position={"kind": "rope", "theta": theta}).position.theta == 10000.0


def test_a_configuration_survives_yaml(tiny_config):
    config = tiny_config(num_layers=4, pattern=[{"norm": "scalenorm"}, {}], norm={"kind": "layernorm", "eps": 1e-5})
    assert validate(ModelConfig, parse_yaml(to_yaml(config))) == config


@given(
    heads=st.integers(1, 12),
    kv_heads=st.integers(1, 12),
    width=st.integers(1, 96),
    head_dim=st.none() | st.integers(1, 9),
)
def test_accepted_shapes_are_those_that_divide(heads, kv_heads, width, head_dim):
    fields = {
        "vocab_size": 7,
        "context_length": 8,
        "embed_dim": width,
        "num_layers": 1,
        "position": "rope",
        "norm": "rmsnorm",
        "attention": {"kind": "softmax", "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim},
        "feedforward": {"kind": "glu", "mlp_dim": 4},
    }
    divides = head_dim is not None or width % heads == 0
    size = head_dim or width // heads
    fits = divides and heads % kv_heads == 0 and size % 2 == 0
    try:
        validate(ModelConfig, fields)
        assert fits
    except RequestError:
        assert not fits
