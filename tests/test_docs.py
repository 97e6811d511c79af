"""Pages that a user reads: what is generated is up to date, menus are whole, and links lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

from polygpt.config import parse_yaml, validate
from polygpt.model import ModelConfig, attention, block, feedforward, norms, positions

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MENUS = {
    "attention": attention.MENU,
    "block": block.MENU,
    "feedforward": feedforward.MENU,
    "norm": norms.MENU,
    "position": positions.MENU,
}


@pytest.fixture(scope="module")
def maker():
    """docs/make_parts.py as a module."""
    spec = importlib.util.spec_from_file_location("make_parts", ROOT / "docs/make_parts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_parts_is_what_the_code_says(maker):
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), "run: make docs"


def test_the_page_of_parts_has_every_slot_of_the_model(maker):
    assert {slot[6:]: menu for slot, menu in maker.SLOTS.items() if re.fullmatch(r"model\.\w+", slot)} == MENUS


def test_no_shared_meaning_is_left_over(maker):
    """Each is of a field that no docstring explains, in some kind."""
    classes = [cls for menu in maker.SLOTS.values() for cls in menu.values()] + [ModelConfig]
    unexplained = {name for cls in classes for name in set(cls.model_fields) - set(maker.attributes(cls))}
    assert set(maker.SHARED) == unexplained - {"kind"}


def test_the_readmes_menus_are_whole():
    text = re.search(r"```yaml\n(model:.*?)```", PAGES[0].read_text(), re.DOTALL)[1]
    for slot, menu in MENUS.items():
        listed = re.search(rf"^  {slot}: .*# (.*)$", text, re.MULTILINE)[1]
        assert listed.split(", ") == list(menu), slot
    assert validate(ModelConfig, parse_yaml(text)["model"]).num_layers == 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_project_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#][^)]*)\)", text):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).replace(" ", "-").lower()
        for line in text.splitlines()
        if line[:1] == "#"
    }
    assert {target.lower() for target in re.findall(r"\]\(#([^)]*)\)", text)} <= headings
