"""Notebooks run from top to bottom: their code cells, in one fresh interpreter."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """A .jsonl file of short documents, for the notebooks that take a text."""
    path, choose = tmp_path_factory.mktemp("pets") / "pets.jsonl", random.Random(0).choice
    names, colors, animals = ["Ada", "Ben", "Carla", "Dan"], ["black", "brown", "grey"], ["cat", "dog", "fox"]
    documents = (
        " ".join(f"{choose(names)} has a {choose(colors)} {choose(animals)}." for _ in range(30)) for _ in range(200)
    )
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, pets):
    cells = json.loads(path.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    shorter = {"NOTEBOOK_STEPS": "6", "NOTEBOOK_SEEDS": "2", "NOTEBOOK_TEXT": str(pets)}
    environment = os.environ | {"TMPDIR": str(tmp_path), "MPLBACKEND": "Agg"} | shorter
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    if path.stem == "first_steps":  # its model has learned that the second sentence is about the first
        assert re.search(r"^Ada has a (\w+) (\w+)\. The \2 is \1\.$", done.stdout, re.MULTILINE), done.stdout
    if path.stem == "train_gpt2":
        assert re.search(r"^acc_norm 0\.\d+ ± 0\.\d+ \(100 questions\)", done.stdout, re.MULTILINE), done.stdout
        assert done.stdout.count("> The function returns") == 3
    if path.stem == "compare_parts":
        assert re.search(r"^as it stands +[\d,]+ +\S+ +\d\.\d+$", done.stdout, re.MULTILINE), done.stdout
        rows = re.findall(
            r"^(RoPE|plain MLP) .* [+-]\d\.\d+ ± \d\.\d+  (?:not|better|worse)", done.stdout, re.MULTILINE
        )
        assert rows == ["RoPE", "plain MLP"]


def test_notebooks_are_kept_without_outputs():
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        assert not any(cell.get("outputs") for cell in cells), f"{path.name}: clear its outputs"


def test_cells_have_ids_of_their_own():
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text())
        ids = [cell["id"] for cell in notebook["cells"]]
        assert len(set(ids)) == len(ids)
        assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", own) for own in ids)
        assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
