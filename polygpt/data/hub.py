"""`hf:datasets/owner/name[@revision]/GLOB`: files of a data set on a Hugging Face hub, through huggingface_hub's cache.

The library's environment variables apply: HF_HUB_OFFLINE reads only the cache, HF_ENDPOINT names another hub, HF_TOKEN
opens private data sets, HF_HOME is where the cache is.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from polygpt.data.reading import format_of
from polygpt.errors import PolygptError, RequestError
from polygpt.hub import check_endpoint, explained

TRIES, LONGEST_WAIT = 7, 60.0
_NAME = re.compile(r"hf:datasets/(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w.-]+))?/(?P<glob>.+)")
T = TypeVar("T")


def check_name(name: str) -> None:
    """Refuses a name that is not of the form above; looks nothing up.

    Raises:
        RequestError: it has another form, or the hub's address is neither https nor on this machine.
    """
    if _NAME.fullmatch(name) is None:
        raise RequestError(
            f"'{name}' is not of the form hf:datasets/owner/name/GLOB or hf:datasets/owner/name@revision/GLOB"
        )
    check_endpoint()


def fetched(name: str) -> Iterator[Path]:
    """The files that `name` matches, sorted by name. Each is downloaded when it is asked for, unless it is cached.

    Raises:
        RequestError: there is no such data set or revision, or no file matches.
        PolygptError: the hub cannot be reached.
    """
    check_name(name)
    match = _NAME.fullmatch(name)
    revision, names = _listed(name, match["repo"], match["revision"])
    files = sorted(file for file in names if _matches(file, match["glob"]) and format_of(Path(file)))
    if not files:
        folders = ", ".join(sorted({file.rpartition("/")[0] or "." for file in names})[:8]) or "none"
        raise RequestError(f"{name}: no file that can be read matches; the folders there are: {folders}")
    return (_downloaded(name, match["repo"], revision, file) for file in files)


def _matches(file: str, pattern: str) -> bool:
    """Whether a path matches, folder by folder: `*` does not cross a slash."""
    words, patterns = file.split("/"), pattern.split("/")
    return len(words) == len(patterns) and all(map(fnmatchcase, words, patterns))


@cache
def _listed(name: str, repo: str, revision: str | None) -> tuple[str | None, tuple[str, ...]]:
    """The commit and the files of a data set; offline, those in the cache."""
    import huggingface_hub as hub

    if hub.constants.HF_HUB_OFFLINE:
        folder = Path(
            _asked(
                name, lambda: hub.snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True)
            )
        )
        return revision, tuple(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    info = _asked(name, lambda: hub.HfApi().dataset_info(repo, revision=revision))
    return info.sha, tuple(file.rfilename for file in info.siblings)


@cache
def _downloaded(name: str, repo: str, revision: str | None, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(_asked(name, lambda: hf_hub_download(repo, file, repo_type="dataset", revision=revision)))


def _asked(name: str, call: Callable[[], T]) -> T:
    """The result of a call to the hub; waits and tries again where the hub is busy or the connection breaks.

    An interrupted download goes on where it was, which is the library's doing.
    """
    from huggingface_hub import constants, errors

    wait = 1.0
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except (errors.RevisionNotFoundError, errors.RepositoryNotFoundError) as error:  # gated ones are of these
            raise explained(name, "data set", error) from None
        except Exception as error:  # the library, its HTTP client and the disk raise many kinds
            response: Any = getattr(error, "response", None)
            offline = isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE
            if offline or attempt == TRIES or not _passes(error):
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                hint = "; HF_HUB_OFFLINE is set" if offline else f"; tried {attempt} times" if attempt > 1 else ""
                raise PolygptError(f"{name}: the hub cannot be read ({reason}{hint})") from None
            asked = response.headers.get("Retry-After", "") if response is not None else ""
            time.sleep(min(float(asked) if asked.isdigit() else wait, LONGEST_WAIT))
            wait *= 2
    raise AssertionError("unreachable")


def _passes(error: Exception) -> bool:
    """Whether the hub is busy or the connection broke, so that trying again may help."""
    from huggingface_hub import errors

    response: Any = getattr(error, "response", None)
    if response is not None:
        return response.status_code == 429 or response.status_code >= 500
    of_client = type(error).__module__.startswith("http")  # the HTTP client's own errors, whichever client it is
    return of_client or isinstance(error, ConnectionError | TimeoutError | errors.LocalEntryNotFoundError)
