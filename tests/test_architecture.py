"""The rules of the house, read off the source: who may import whom, by which door, and what is nowhere."""

import ast
import importlib
import keyword
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "polygpt"

# A room imports only rooms above it.
ROOMS = [
    "errors",
    "files",
    "cache",
    "process",
    "hub",
    "folders",
    "config",
    "settings",
    "distributed",
    "sharding",
    "tokenizers",
    "kernels",
    "model",
    "spec",
    "presets",
    "checkpoint",
    "interop",
    "data",
    "generation",
    "origin",
    "language_model",
    "loading",
    "evaluation",
    "inspection",
    "training",
    "recipes",
    "demo",
    "summary",
    "diagnosis",
    "planning",
    "harness",
    "server",
    "cli",
    "__main__",
]
# Packages within a room that are a door of their own; the room's own door would load what they are kept apart for.
SIDE_DOORS = {"polygpt.training.listeners"}
FILES = sorted(PACKAGE.rglob("*.py"))
PACKAGES = [path for path in FILES if path.name == "__init__.py" and path.parent != PACKAGE]
UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in FILES}
ALL_FILES = pytest.mark.parametrize("path", FILES, ids=name_of)


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, those within functions and for type checkers included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written in full"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_every_room_is_in_the_order():
    assert {room_of(module) for module in MODULES if module != "polygpt"} == set(ROOMS)


def test_the_page_on_the_architecture_lists_the_rooms_in_their_order():
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(table))[: len(ROOMS) - 1] == ROOMS[:-1]


@ALL_FILES
def test_a_room_imports_only_rooms_above_it_and_by_their_door(path):
    module = name_of(path)
    for imported in imports(parse(path)):
        if not imported.startswith("polygpt") or module == "polygpt":
            continue
        assert imported != "polygpt", f"{module} imports the public door, which stands for rooms below it"
        here, there = room_of(module), room_of(imported)
        if here == there:
            continue
        assert ROOMS.index(there) < ROOMS.index(here), f"{module} imports {imported}, a room below it"
        assert imported == f"polygpt.{there}" or imported in SIDE_DOORS, f"{module} goes around the door of {there}"


@ALL_FILES
def test_nothing_is_imported_by_a_computed_name_but_commands_public_names_and_parts(path):
    calls = [node.func for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    names = {func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "") for func in calls}
    if names & {"import_module", "__import__"}:
        assert name_of(path) in {"polygpt", "polygpt.cli", "polygpt.config.base"}


@ALL_FILES
def test_nothing_read_can_run_code(path):
    tree = parse(path)
    assert not {module.split(".")[0] for module in imports(tree)} & UNSAFE_MODULES
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", None) not in {"eval", "exec", "compile"}, f"line {node.lineno}"
            assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), f"line {node.lineno}"


@ALL_FILES
def test_a_file_is_short_enough_to_be_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


@ALL_FILES
def test_a_file_says_what_it_is(path):
    assert ast.get_docstring(parse(path))


@pytest.mark.parametrize("path", PACKAGES, ids=name_of)
def test_a_door_lists_what_it_lets_through(path):
    package, tree = name_of(path), parse(path)
    let_through, defined = set(), set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith(f"{package}."):
            let_through |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {target.id for target in targets if target.id.isupper()}
    listed = getattr(importlib.import_module(package), "__all__", None)
    if let_through:
        assert listed is not None
        assert sorted(set(listed)) == sorted(listed)
        assert set(listed) == let_through | {name for name in defined if not name.startswith("_")}


def test_the_public_names_are_one_list_and_all_there():
    import polygpt

    checked = {
        alias.name: node.module
        for block in parse(PACKAGE / "__init__.py").body
        if isinstance(block, ast.If)
        for node in block.body
        for alias in node.names
    }
    assert {name: f"polygpt.{home}" for name, home in polygpt._HOMES.items()} == checked
    assert sorted(polygpt._HOMES) == polygpt.__all__ == dir(polygpt)
    for name, module in checked.items():
        assert getattr(polygpt, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = polygpt.nothing


def test_every_command_is_in_its_own_module():
    import click

    from polygpt import cli

    modules = {path.stem.removesuffix("_") for path in (PACKAGE / "cli").glob("*.py")} - {
        "__init_",
        "batch",
        "output",
        "settings",
    }
    assert modules == set(cli.COMMANDS)
    for name in cli.COMMANDS:
        home = f"{name}_" if keyword.iskeyword(name) else name  # `import` is no name in Python
        assert isinstance(getattr(importlib.import_module(f"polygpt.cli.{home}"), home), click.Command)


def test_nothing_names_a_registry_or_a_folder_of_one_machine():
    # In pieces, or this file would be the first to be found.
    words = ["pypi" + r"\.org", "python" + r"hosted\.org", "index" + "-url", "npmjs" + r"\.", "/tmp" + "/lab"]
    forbidden = re.compile("|".join([*words, r"(?<![\w.])/" + r"work/"]))
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        found = forbidden.search(text)
        assert not found, f"{name}: {found[0]}"
