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
    "smollm": 134_515_008,
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
}
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
    ],
)
def test_facts_of_presets(name, facts):
    config = preset(name)
    assert {key: getattr(config, key) for key in facts} == facts


def test_multi_query_of_giant():
    assert preset("giant").attention.kv_heads == 1
    assert preset("giant").feedforward.mlp_dim == 341


def test_overrides_reach_nested_fields_and_keep_the_rest():
    config = preset("gpt2", num_layers=4, attention={"num_heads": 6}, **{"feedforward.mlp_dim": 100})
    assert (config.num_layers, config.attention.num_heads, config.feedforward.mlp_dim) == (4, 6, 100)
    assert config.attention.bias


def test_a_misspelled_preset_names_the_nearest():
    with pytest.raises(RequestError, match="gpt2"):
        preset("gtp2")


def test_the_readmes_table_has_every_preset_and_its_count():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = {line.split("`")[1]: line for line in readme.splitlines() if line.startswith("| `")}
    assert set(rows) == set(PRESETS)
    for name, count in COUNTS.items():
        assert rows[name].endswith(f"| {count:,} |"), name
