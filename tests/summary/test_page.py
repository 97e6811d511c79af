"""The page of a model: one file, whatever the model's size, with weights where there are some."""

import re

from polygpt.model import Model
from polygpt.presets import preset
from polygpt.summary import model_page


def small():
    return Model(preset("gpt", num_layers=1, embed_dim=24, vocab_size=64, **{"attention.num_heads": 4}))


def test_a_page_needs_nothing_but_itself():
    page = model_page(small(), "a <model>")
    assert page.startswith("<!DOCTYPE html>")
    assert "<title>a &lt;model&gt;</title>" in page
    assert "num_layers: 1" in page
    assert not re.search(r"""(src|href)\s*=|@import|https?://""", page)


def test_nothing_is_allocated_for_shapes():
    model = Model(preset("tiny_moe_2", num_layers=30_000))  # 4 TB
    assert "1,027,266,444,960 parameters" in model_page(model, "large")


def test_weights_are_drawn_where_they_are_given():
    model = small()
    assert len(model_page(model, "m", model.init(0))) > 1.5 * len(model_page(model, "m"))
