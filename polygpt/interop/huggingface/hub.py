"""`hf:owner/name[@revision]`: the files of a model on a Hugging Face hub, through huggingface_hub's own cache.

The library's environment variables apply: HF_HUB_OFFLINE reads only the cache, HF_ENDPOINT names another hub, HF_TOKEN
opens private models, HF_HOME is where the cache is.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from polygpt.errors import PolygptError, RequestError

PREFIX = "hf:"
# The files that a model is opened from: no code and no pickles.
_WANTED = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json")
_WANTED += ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
_WANTED += ("chat_template.jinja",)
_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
LIMIT_VARIABLE, LIMIT_GB = "POLYGPT_MAX_DOWNLOAD_GB", 100.0


def fetch(name: str) -> Path:
    """The folder with the files of `hf:owner/name[@revision]`; those missing from the cache are downloaded.

    Raises:
        RequestError: the name has another form, there is no such model, it is too large, or the hub's address is
            neither https nor (for tests) on this machine.
        PolygptError: the hub cannot be reached, or a file does not match the SHA-256 that the hub gives.
    """
    match = _NAME.fullmatch(name.removeprefix(PREFIX))
    if match is None:
        raise RequestError(f"'{name}' is not of the form hf:owner/name or hf:owner/name@revision")
    _check_endpoint()
    from huggingface_hub import constants, errors, snapshot_download

    wanted = {"repo_id": match["repo"], "revision": match["revision"], "allow_patterns": list(_WANTED)}
    try:
        planned = None if constants.HF_HUB_OFFLINE else _planned(wanted)
        _check_size(name, sum(file.file_size or 0 for file in planned or ()))
        folder = Path(snapshot_download(**wanted, local_files_only=planned is None))
    except RequestError:
        raise
    except errors.RevisionNotFoundError:
        raise RequestError(f"{name}: the model has no revision '{match['revision']}'") from None
    except errors.GatedRepoError:
        raise RequestError(f"{name}: its owner must grant access first; then set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise RequestError(f"{name}: no such model on the hub, or it is private (set HF_TOKEN)") from None
    except errors.LocalEntryNotFoundError:
        raise PolygptError(f"{name}: not in the cache, and the hub cannot be reached (HF_HUB_OFFLINE?)") from None
    except Exception as error:  # the library, its HTTP client and the disk raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PolygptError(f"{name}: the hub cannot be read ({reason})") from None
    for file in planned or ():
        _check_hash(folder / file.filename)
    if not (folder / "config.json").is_file():
        raise RequestError(f"{name}: it has no config.json, so it is not a model of the transformers library")
    return folder


def _planned(wanted: dict[str, Any]) -> list[Any] | None:
    """What would be downloaded; None if the hub cannot be reached, so that only the cache is left."""
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        disable_progress_bars()
    try:
        return [file for file in snapshot_download(**wanted, dry_run=True) if file.will_download]
    except errors.DryRunError as error:
        if isinstance(error.__cause__, errors.RepositoryNotFoundError):
            raise error.__cause__ from None
        return None
    finally:
        if sys.stderr.isatty() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
            enable_progress_bars()


def _check_endpoint() -> None:
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://"))
    if endpoint.scheme != "https" and endpoint.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise RequestError(
            f"HF_ENDPOINT={endpoint.geturl()}: must be https, so that nobody can change the files on the way"
        )


def _check_size(name: str, size: int) -> None:
    value = os.environ.get(LIMIT_VARIABLE, LIMIT_GB)
    try:
        limit = float(value)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise RequestError(f"{LIMIT_VARIABLE}={value} is not a number (of gigabytes)")
    if size > limit * 1e9:
        raise RequestError(f"{name}: {size / 1e9:,.1f} GB to download, more than {limit:g}; raise {LIMIT_VARIABLE}")


def _check_hash(path: Path) -> None:
    """Large files in the cache are named by the SHA-256 that the hub states; the downloaded file must match it."""
    stored = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", stored.name):
        return
    with stored.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != stored.name:
        stored.unlink()
        path.unlink(missing_ok=True)
        raise PolygptError(f"{path.name}: the download does not match the SHA-256 that the hub states; try again")
