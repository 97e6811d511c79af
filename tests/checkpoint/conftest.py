"""Checkpoints that tests read, or damage."""

import shutil

import pytest
from checkpoints import save


@pytest.fixture
def warned():
    return []


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Steps 1, 2 and 3; not to be written to."""
    root = tmp_path_factory.mktemp("saved")
    for step in (1, 2, 3):
        save(root, step, last=3)
    return root


@pytest.fixture
def root(saved, tmp_path):
    """A copy of `saved` to be damaged."""
    return shutil.copytree(saved, tmp_path / "root")
