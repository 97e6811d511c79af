"""Where tests of the C++ library run: a source that a compiler refuses fails them, and is not skipped."""

import os

import jax
import pytest

from polygpt.kernels import native


def missing() -> str | None:
    """What the machine lacks for the library; None where it has to work."""
    if jax.default_backend() != "cpu":
        return "not on a CPU"
    if os.environ.get(native.SETTING) in ("", "0", "off"):
        return f"{native.SETTING} turns it off"
    try:
        native._compiler()
    except FileNotFoundError as error:
        return str(error)
    return None


native.available()  # compiles and registers it; where that fails, so do the tests
needs_compiler = pytest.mark.skipif(missing() is not None, reason=missing() or "")
