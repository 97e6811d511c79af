"""`hf:owner/name[@revision]`: files of a repository on a Hugging Face hub, through huggingface_hub's own cache.

The library's environment variables apply: HF_HUB_OFFLINE reads only the cache, HF_ENDPOINT names another hub, HF_TOKEN
opens private models, HF_HOME is where the cache is.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from polygpt.errors import PolygptError, RequestError

PREFIX = "hf:"
# The files that a tokenizer is opened from.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")
_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
LIMIT_VARIABLE, LIMIT_GB = "POLYGPT_MAX_DOWNLOAD_GB", 100.0


def is_name(name: str) -> bool:
    """Whether `name` has the form owner/name or owner/name@revision."""
    return _NAME.fullmatch(name) is not None


def fetch(name: str, files: Sequence[str], what: str = "model") -> Path:
    """The folder with the files of `hf:owner/name[@revision]`; those missing from the cache are downloaded.

    Args:
        name: the repository.
        files: patterns of the files that are wanted.
        what: what is looked for, for messages.

    Raises:
        RequestError: the name has another form, there is no such repository, it is too large, or the hub's address is
            neither https nor (for tests) on this machine.
        PolygptError: the hub cannot be reached, or a file does not match the SHA-256 that the hub gives.
    """
    match = _NAME.fullmatch(name.removeprefix(PREFIX))
    if match is None:
        raise RequestError(f"'{name}' is not of the form hf:owner/name or hf:owner/name@revision")
    check_endpoint()
    from huggingface_hub import constants, snapshot_download

    wanted = {"repo_id": match["repo"], "revision": match["revision"], "allow_patterns": list(files)}
    try:
        planned = None if constants.HF_HUB_OFFLINE else _planned(wanted)
        _check_size(name, sum(file.file_size or 0 for file in planned or ()))
        folder = Path(snapshot_download(**wanted, local_files_only=planned is None))
    except RequestError:
        raise
    except Exception as error:  # the library, its HTTP client and the disk raise many kinds
        raise explained(name, what, error, match["revision"]) from None
    for file in planned or ():
        _check_hash(folder / file.filename)
    return folder


def explained(name: str, what: str, error: Exception, revision: str | None = None) -> PolygptError:
    """The error to raise where the library raised `error` while `name`, a `what`, was read from the hub."""
    from huggingface_hub import errors

    match error:
        case errors.RevisionNotFoundError():
            asked = f"revision '{revision}'" if revision else "such revision"
            return RequestError(f"{name}: the {what} has no {asked}")
        case errors.GatedRepoError():
            return RequestError(f"{name}: its owner must grant access first; then set HF_TOKEN")
        case errors.RepositoryNotFoundError():
            return RequestError(f"{name}: no such {what} on the hub, or it is private (set HF_TOKEN)")
        case errors.LocalEntryNotFoundError():
            return PolygptError(f"{name}: not in the cache, and the hub cannot be reached (HF_HUB_OFFLINE?)")
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return PolygptError(f"{name}: the hub cannot be read ({reason})")


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


def check_endpoint() -> None:
    """Refuses a hub whose address is neither https nor on this machine.

    Raises:
        RequestError: it is not.
    """
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
