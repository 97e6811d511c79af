"""What a MODEL may be called: a misspelled one is refused without importing JAX."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from polygpt.errors import RequestError, suggest
from polygpt.files import expand
from polygpt.hub import PREFIX as HUB

_FORMS = "name a run's folder, a folder or file of weights, hf:owner/name, or a preset (polygpt presets)"


def check_model_name(name: str, presets: Iterable[str]) -> None:
    """Refuses a name that is no file or folder, no preset, and not of the Hugging Face Hub.

    Raises:
        RequestError: names the nearest preset or model in the same folder.
    """
    path = expand(name)
    if name.startswith(HUB) or path.exists() or name in presets:
        return
    hint = suggest(name, [*presets, *models_in(path.parent)])
    raise RequestError(f"no model '{name}'; {hint if hint.startswith('did you mean') else _FORMS}")


def models_in(folder: Path) -> list[str]:
    """The paths of the models in `folder`."""
    with suppress(OSError):
        markers = ("config.yaml", "config.json")
        paths = [path for path in folder.iterdir() if any((path / marker).is_file() for marker in markers)]
        return [str(path) for path in [*paths, *folder.glob("*.gguf")]]
    return []
