"""Presets have the published shapes, to the parameter."""

from pathlib import Path

import pytest

from polygpt.errors import RequestError
from polygpt.model import Model
from polygpt.presets import PRESETS, preset

COUNTS = {
    "gpt": 124_475_904,
    "vgpt": 124_439_808,
    "nope_gpt": 123_689_472,
    "glu_gpt": 152_741_376,
    "rope_gpt": 123_689_472,
    "glu_rope_gpt": 151_954_944,
    "gqa_gpt": 82_721_664,
    "gqa_glu_rope_gpt": 142_480_896,
    "tiny_moe": 631_370_304,
    "tiny_moe_2": 1_061_037_600,
    "tiny_moe_3": 650_170_944,
    "smollm": 134_515_008,
    "charformer": 333_268_800,
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
}
# Where a token uses a part of them.
ACTIVE = {"tiny_moe": 248_666_688, "tiny_moe_2": 317_859_360}
# Counted by hand at a vocabulary of 1,000: embedding + positions + layers + final norm + head.
SMALL = {
    "giant": 1000 * 256 + 2 * (256 * 256 * 2 + 2 * 256 * 128 + 3 * 256 * 341 + 2 * 256) + 256,
    "modular": 2 * 1000 * 256 + 6 * (4 * 256 * 256 + 3 * 256 * 1024 + 2 * 256) + 256,
    "small": 2 * 1000 * 512 + 512 * 512 + 6 * (4 * 512**2 + 2 * 512 * 2048 + 2048 + 512 + 4 * 512) + 2 * 512,
    "tiny_large": 1000 * 384 + 256 * 384 + 6 * (4 * 384**2 + 2 * 384 * 1536 + 1536 + 384 + 4 * 384) + 2 * 384,
    "bigram": 1000**2,
}


def test_every_preset_is_counted():
    assert set(COUNTS) | set(SMALL) == set(PRESETS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    assert Model(preset(name)).num_parameters == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_active_parameter_counts(name):
    assert Model(preset(name)).num_active_parameters == ACTIVE.get(name, COUNTS[name])


@pytest.mark.parametrize("name", SMALL)
def test_parameter_counts_of_small_models(name):
    assert Model(preset(name, vocab_size=1000)).num_parameters == SMALL[name]


def test_smollm_at_gpt2s_vocabulary():
    assert Model(preset("smollm", vocab_size=50257)).num_parameters == 135_151_488


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("giant", {"compute_dtype": "bfloat16", "context_length": 257, "head": "tied"}),
        ("modular", {"head": "untied", "dropout": 0.1, "context_length": 256}),
        ("gpt2", {"compute_dtype": "bfloat16", "param_dtype": "float32", "context_length": 1024}),
        ("vgpt", {"dropout": 0.1, "init": "fan_in"}),
        ("smollm", {"context_length": 2048, "compute_dtype": "float32"}),
        ("tiny_moe", {"context_length": 2048, "compute_dtype": "bfloat16", "param_dtype": "float32"}),
        ("tiny_moe_2", {"context_length": 2048, "compute_dtype": "bfloat16", "vocab_size": 50304}),
        ("tiny_moe_3", {"context_length": 2048, "compute_dtype": "bfloat16", "head": "tied"}),
        ("charformer", {"compute_dtype": "bfloat16", "param_dtype": "bfloat16", "vocab_size": 259}),
    ],
)
def test_facts_of_presets(name, facts):
    config = preset(name)
    assert {key: getattr(config, key) for key in facts} == facts


def test_multi_query_of_giant():
    assert preset("giant").attention.kv_heads == 1
    assert preset("giant").feedforward.mlp_dim == 341


EXPERTS = {"mlp_dim": 2304, "num_experts": 8, "gated": True, "activation": "silu", "bias": True}


@pytest.mark.parametrize(
    ("name", "feedforwards", "facts"),
    [
        (
            "tiny_moe",
            ["moe", "glu"] * 16,
            {
                **EXPERTS,
                "top_k": 2,
                "dispatch": "capacity",
                "capacity_factor": 1.1,
                "claim_order": "weight",
                "load_balance_loss": 1e-2,
                "z_loss": 1e-3,
            },
        ),
        (
            "tiny_moe_2",
            ["moe"] * 30,
            {
                **EXPERTS,
                "mlp_dim": 2048,
                "bias": False,
                "top_k": 2,
                "dispatch": "capacity",
                "capacity_factor": 1.25,
                "claim_order": "choice",
                "load_balance_loss": 1e-2,
                "z_loss": 1e-4,
            },
        ),
        ("tiny_moe_3", ["soft_moe", "glu"] * 16, {**EXPERTS, "slots_per_expert": 256}),
    ],
)
def test_experts_are_in_their_layers_with_their_losses(name, feedforwards, facts):
    layers = preset(name).layers
    assert [layer.feedforward.kind for layer in layers] == feedforwards
    experts = layers[0].feedforward
    assert {key: getattr(experts, key) for key in facts} == facts
    weights = {key: value for key, value in experts.to_dict().items() if key.endswith("loss")}
    assert set(weights) == {key for key in facts if key.endswith("loss")}
    assert not getattr(experts, "normalize_weights", False)
    assert not getattr(experts, "shared_experts", 0)
    plain = layers[-1].feedforward
    assert plain.kind == "moe" or (plain.mlp_dim, plain.activation, plain.bias) == (2304, "silu", False)


@pytest.mark.parametrize("name", PRESETS)
def test_layers_are_those_of_the_readmes_row(name):
    config, cells = preset(name), readme_rows()[name]
    if not config.num_layers:
        return
    heads, bias = config.attention.num_heads, " bias" if config.attention.bias else ""
    assert cells[:3] == [str(config.num_layers), f"{heads}/{config.attention.kv_heads}{bias}", str(config.embed_dim)]
    assert cells[4:6] == [config.position.kind, config.norm.kind]
    for part in {layer.feedforward for layer in config.layers}:
        size = f"{part.num_experts} × {part.mlp_dim}" if "moe" in part.kind else part.mlp_dim
        assert f"{part.kind} {size} {part.activation}" in cells[3]


def test_overrides_reach_nested_fields_and_keep_the_rest():
    config = preset("gpt2", num_layers=4, attention={"num_heads": 6}, **{"feedforward.mlp_dim": 100})
    assert (config.num_layers, config.attention.num_heads, config.feedforward.mlp_dim) == (4, 6, 100)
    assert config.attention.bias


def test_a_misspelled_preset_names_the_nearest():
    with pytest.raises(RequestError, match="gpt2"):
        preset("gtp2")


def readme_rows():
    """The cells of the table of presets after the name, by name."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = (line for line in readme.splitlines() if line.startswith("| `"))
    return {line.split("`")[1]: [cell.strip() for cell in line.split("|")[2:-1]] for line in rows}


def test_the_readmes_table_has_every_preset_and_its_count():
    rows = readme_rows()
    assert list(rows) == list(PRESETS)
    for name, count in COUNTS.items():
        active = f" ({ACTIVE[name]:,} active)" if name in ACTIVE else ""
        late = "" if Model(preset(name)).training_caveat is None else "†"
        assert rows[name][-1] == f"{count:,}{active}{late}", name
