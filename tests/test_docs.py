"""Pages that a user reads: what is generated is up to date, registries are whole, and links lead somewhere."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from polygpt.cache import COMPILED_BYTES, SETTING
from polygpt.config import known_keys, parse_overrides, parse_yaml, validate
from polygpt.data import DataConfig
from polygpt.model import Model, ModelConfig, attention, block, feedforward, norms, positions
from polygpt.recipes import load_recipe
from polygpt.tokenizers import TokenizerConfig
from polygpt.training import RunConfig, SamplingConfig, TrainingConfig
from polygpt.training.optimizers import OPTIMIZERS, SCHEDULES, ParameterGroups

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MENUS = {
    "attention": attention.REGISTRY,
    "block": block.REGISTRY,
    "feedforward": feedforward.REGISTRY,
    "norm": norms.REGISTRY,
    "position": positions.REGISTRY,
}


@pytest.fixture(scope="module")
def maker():
    """docs/make_parts.py as a module."""
    spec = importlib.util.spec_from_file_location("make_parts", ROOT / "docs/make_parts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_parts_is_what_the_code_says(maker):
    assert maker.PARTS.read_text(encoding="utf-8") == maker.page(), "run: make docs"


def test_the_page_of_settings_is_what_the_code_says(maker):
    assert maker.SETTINGS.read_text(encoding="utf-8") == maker.settings_page(), "run: make docs"


def test_the_page_of_settings_has_every_setting_of_a_run(maker):
    text, keys = maker.settings_page(), known_keys(RunConfig)

    def listed(keys, path):
        section = text[text.index(f"\n## {path}\n") :].partition("\n## ")[2].partition("\n## ")[0]
        for name, below in keys.items():
            assert f"\n| `{name}` | " in section, f"{path}.{name}"
            if below is not None and "keys" in below:
                listed(below["keys"], f"{path}.{name}")

    for name in sorted(keys.keys() - {"model"}):
        listed(keys[name]["keys"], name)


def test_the_keys_that_the_command_line_knows_are_what_the_code_says(maker):
    assert maker.KEYS.read_text(encoding="utf-8") == maker.keys_of_a_run(), "run: make docs"


def test_no_setting_is_explained_twice(maker):
    classes = {"data": DataConfig, "tokenizer": TokenizerConfig, "training.samples": SamplingConfig}
    for path in maker.OF_A_RUN:
        section, _, name = path.rpartition(".")
        assert name in classes[section].model_fields
        assert name not in maker.attributes(classes[section]), path


def test_what_the_page_of_settings_says_of_values_is_so():
    assert load_recipe("demo", parse_overrides(["data.path=corpus #2"])).data.path == "corpus #2"
    words = re.findall(r"`((?:model|training|data)\.[\w.]+=[^`]+)`", (ROOT / "docs/settings.md").read_text())
    for word in " ".join(words).replace("#2", "").split(" "):
        if "num_experts" not in word and word:
            load_recipe("demo", parse_overrides([word, *(["model.attention.window=16"] if "local" in word else [])]))


def test_the_page_of_parts_has_every_slot_of_the_model(maker):
    assert {slot[6:]: registry for slot, registry in maker.SLOTS.items() if re.fullmatch(r"model\.\w+", slot)} == MENUS


def test_no_shared_meaning_is_left_over(maker):
    """Each is of a field that no docstring explains, in some kind."""
    classes = [cls for registry in maker.SLOTS.values() for cls in registry.values()] + [ModelConfig]
    unexplained = {name for cls in classes for name in set(cls.model_fields) - set(maker.attributes(cls))}
    assert set(maker.SHARED) == unexplained - {"kind"}


def test_the_readmes_menus_are_whole():
    text = re.search(r"```yaml\n(model:.*?)```", PAGES[0].read_text(), re.DOTALL)[1]
    for slot, registry in MENUS.items():
        listed = re.search(rf"^  {slot}: .*# (.*)$", text, re.MULTILINE)[1]
        assert listed.split(", ") == list(registry), slot
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


def test_the_tests_that_the_page_of_reliability_names_exist():
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests/\w+/)?)(test_\w+\.py)(?:::(\w+))?`", page)
    assert len(named) > 20
    for folder, file, test in named:
        path = ROOT / (folder or "tests/training/") / file
        assert path.is_file(), path
        assert not test or f"\ndef {test}(" in path.read_text(encoding="utf-8"), f"{path}: {test}"


def test_the_page_of_installing_names_what_there_is():
    text = (ROOT / "docs/install.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"^\| `\.\[(\w+)\]`", text, re.MULTILINE)) == set(project["optional-dependencies"]) - {
        "parity"
    }
    assert f"{COMPILED_BYTES >> 20} MiB" in text
    assert SETTING in text
    targets = set(re.findall(r"`make (\w+)`", text))
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_blocks_of_the_python_page_run_and_name_every_public_function(tmp_path, monkeypatch):
    import polygpt

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python-api.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for code in blocks:
        exec(compile(code, "docs/python-api.md", "exec"), namespace)
    assert [name for name in polygpt.__all__ if f"polygpt.{name}" not in "".join(blocks)] == []


def test_what_the_page_of_training_shows_can_be_trained():
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```\n(polygpt .*?)```", text, re.DOTALL) for line in block.splitlines()]
    configs = []
    for line in lines:
        program, command, recipe, *words = shlex.split(line)
        assert (program, command in ("train", "show")) == ("polygpt", True), line
        configs.append(load_recipe(recipe, parse_overrides([word for word in words if "=" in word])))
    assert {config.training.optimizer.kind for config in configs} == set(OPTIMIZERS)
    assert {config.training.schedule.kind for config in configs} >= set(SCHEDULES) - {"trapezoid"}
    groups, band = (parse_yaml(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    demo = load_recipe("demo")
    model = Model(demo.model.with_vocab(64))
    ParameterGroups(model.parameters, validate(TrainingConfig, demo.training.to_dict() | groups["training"]).groups)
    assert band["expected"].items() <= demo.expected.to_dict().items(), "the band of the demo"
