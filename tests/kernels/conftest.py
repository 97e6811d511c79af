"""Kernels that have two forms on a CPU."""

import pytest
from compilers import missing

from polygpt.kernels import native


@pytest.fixture(params=["C++", "XLA"])
def compute(request, monkeypatch):
    """What computes products with packed weights, and attention over a cache."""
    if request.param == "XLA":
        monkeypatch.setattr(native, "available", lambda: False)
    elif lacks := missing():
        pytest.skip(lacks)
    else:
        assert native.available(), native.unavailable()
    return request.param
