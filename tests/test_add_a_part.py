"""`docs/add-a-part.md` does what it says: its files are written out and its commands are run, in real processes."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs/add-a-part.md"
FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# The run, made as short as can be.
SHORTER = {"steps: 300": "steps: 4", "num_layers: 2": "num_layers: 1", "training.steps=600": "training.steps=6"}


def blocks() -> tuple[dict[str, str], list[list[str]]]:
    """The files that the page shows, by name, and the words of its commands."""
    files, commands = {}, []
    for language, name, text in FENCE.findall(PAGE.read_text(encoding="utf-8")):
        if name:
            files[name] = text
        else:
            assert language == "sh"
            commands += [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]
    return files, commands


@pytest.fixture
def page(tiny_files, tmp_path, monkeypatch):
    """A folder with the page's files and text to train on, the current one; gives the commands."""
    files, commands = blocks()
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_files / "text.txt", "notes.txt")
    for name, text in files.items():
        for long, short in SHORTER.items():
            text = text.replace(long, short)
        Path(name).write_text(text, encoding="utf-8")
    assert {"steps: 4", "num_layers: 1"} == {
        short for short in SHORTER.values() if short in Path("ema.yaml").read_text()
    }
    return [[SHORTER.get(word, word) for word in words] for words in commands]


def test_the_page_shows_a_part_in_few_lines():
    code = blocks()[0]["ema.py"].partition("import jax")[2]
    assert len([line for line in code.splitlines() if line.strip()]) < 40


def test_the_page_shows_each_kind_of_command():
    assert [words[:2] for words in blocks()[1]] == [
        ["polygpt", "show"],
        ["polygpt", "train"],
        ["polygpt", "train"],
        ["polygpt", "generate"],
        ["python", "check_ema.py"],
    ]


def test_a_part_of_the_users_own_is_shown_trained_resumed_generated_from_and_checked(page, process):
    shown, trained, resumed, generated, checked = page
    tree = process(*shown[1:]).out
    assert "attention: ema:EMAConfig channels=128" in tree
    assert "memory" in tree
    results = [process(*words[1:], "--json") for words in (trained, resumed)]
    assert [done.code for done in results] == [0, 0], results
    assert [json.loads(done.out)["steps"] for done in results] == [4, 6]
    done = process(*generated[1:], "--max-new-tokens", "20", "--temperature", "0", "--json")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["tokens"]) == 20
    done = subprocess.run([sys.executable, *checked[1:]], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "decode equals the full pass\n"), done.stderr


def test_without_its_module_a_run_names_what_is_missing(page, process):
    Path("ema.py").rename("elsewhere.txt")
    done = process(*page[1][1:])
    assert (done.code, done.complaint) == (
        2,
        ["model.attention: cannot import 'ema' of kind 'ema:EMAConfig': No module named 'ema'"],
    )
    assert not Path("runs").exists()


def test_the_pages_table_is_of_what_parts_must_define():
    from polygpt import model

    rows = [re.findall(r"`([^`]+)`", line) for line in PAGE.read_text().splitlines() if "Config` | `build" in line]
    assert len(rows) == 5
    for _, base, *rest in rows:
        needed = getattr(model, base).needed
        assert tuple(word.partition("(")[0] for word in rest[: len(needed)]) == needed
