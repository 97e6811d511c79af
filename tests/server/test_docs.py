"""docs/serving.md names every field, limit, code and metric that there is."""

import re
from pathlib import Path

import pytest
import serving

from polygpt.server import ServerSettings
from polygpt.server.metrics import Metrics
from polygpt.server.schemas import ChatCompletion, Completion

PAGE = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("cls", [Completion, ChatCompletion, ServerSettings])
def test_every_field_is_on_the_page(cls):
    named = set(re.findall(r"`([a-z_.]+)`", PAGE))
    wanted = set(cls.model_fields) | set(getattr(cls, "IGNORED", ())) | set(getattr(cls, "REFUSED", ()))
    assert wanted <= named


def test_every_metric_is_on_the_page():
    found = {family.name for family in Metrics([]).registry.collect()}
    assert found
    assert all(f"`{name}" in PAGE for name in found)


def test_every_code_of_an_error_is_on_the_page():
    sources = Path(__file__).parents[2].glob("polygpt/server/**/*.py")
    codes = {code for path in sources for code in re.findall(r'code="(\w+)"', path.read_text(encoding="utf-8"))}
    codes |= {"engine_failed", "shutting_down"}
    assert {code for code in codes if f"`{code}`" not in PAGE} == set()
    assert serving.TEMPLATE
