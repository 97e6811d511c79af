"""`docs/the-model.md` against the specification: its tables list every kind, and its examples run."""

import re
from pathlib import Path

import jax
import pytest

from polygpt import spec
from polygpt.model import Model
from polygpt.presets import preset

GUIDE = (Path(__file__).parents[2] / "docs" / "the-model.md").read_text(encoding="utf-8")
TABLES = {
    "norm": spec.NORM,
    "position": spec.POSITION,
    "scaling": spec.ROPE_SCALING,
    "attention": spec.ATTENTION,
    "feedforward": spec.FEEDFORWARD,
    "claim order": spec.CLAIM_ORDER,
    "block": spec.BLOCK,
}


def first_column(heading: str) -> list[str]:
    """The names in the first column of the table that `heading` heads."""
    rows = GUIDE.split(f"\n| {heading} |")[1].split("\n\n")[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]


@pytest.mark.parametrize("heading", TABLES)
def test_a_table_lists_its_menu(heading):
    assert first_column(heading) == list(TABLES[heading])


def test_every_activation_is_named():
    assert re.findall(r"`(\w+)`", re.search(r"`act` is one of (.*?);", GUIDE, re.S)[1]) == list(spec.ACTIVATION)


def test_the_legend_names_every_axis():
    legend = set(first_column("axis"))
    for name in ("gpt", "tiny_moe", "tiny_moe_3"):
        infos = jax.tree.leaves(Model(preset(name)).parameters)
        assert {axis for info in infos for axis in info.axes} <= legend
    assert all(axis in spec.__doc__ for axis in legend)


def test_the_examples_run():
    names = {}
    for code in re.findall(r"```python\n(.*?)```", GUIDE, re.S):
        exec(code, names)
