"""The page of a model: one file, whatever the model's size, with weights where there are some."""

import re
import shutil
import subprocess

import pytest

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


def test_a_parameter_is_its_shape_and_axes():
    page = model_page(small(), "m")
    assert "axes" in page
    assert not re.search(r"\b(deviation|stack|active)=", page)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [600, 1280])
def test_a_page_is_not_wider_than_its_window(tmp_path, width):
    measure = "<script>setTimeout(() => document.title = document.documentElement.scrollWidth, 1000)</script></body>"
    (tmp_path / "page.html").write_text(model_page(small(), "m").replace("</body>", measure))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},800", "--virtual-time-budget=5000", "--dump-dom", str(tmp_path / "page.html")]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert 300 < int(re.search(r"<title>(\d+)</title>", shown)[1]) <= width
