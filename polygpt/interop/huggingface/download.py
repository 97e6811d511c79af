"""`hf:owner/name[@revision]`: a model on a Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from polygpt import hub
from polygpt.errors import RequestError

# No code and no pickles.
_WANTED = ("*.safetensors", "*.safetensors.index.json", "config.json", *hub.TOKENIZER_FILES)


def fetch(name: str) -> Path:
    """The folder with the files of the model `hf:owner/name[@revision]`; those not in the cache are downloaded.

    Raises:
        RequestError: it holds no model, or as `hub.fetch`.
        PolygptError: as `hub.fetch`.
    """
    folder = hub.fetch(name, _WANTED)
    if not (folder / "config.json").is_file():
        raise RequestError(f"{name}: it has no config.json, so it is not a model of the transformers library")
    return folder
