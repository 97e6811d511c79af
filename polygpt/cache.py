"""What the command line keeps between runs in the user's cache folder: compiled programs, and answers slow to compute.

The folder is $XDG_CACHE_HOME/polygpt (~/.cache/polygpt); POLYGPT_CACHE names another, `off` none. It may be deleted at
any time. Importing polygpt does not touch it: commands do, and the first decoding on a CPU, which compiles C++
(`kernels/native`). Where it cannot be written, nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

SETTING = "POLYGPT_CACHE"
COMPILED_BYTES = 2**29
ANSWERS = 256  # of a few kB each

# What an answer may depend on beside polygpt's own files: it is computed anew when one of these changes.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "pydantic", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")
_VARIABLES = ("JAX_", "XLA_", "CUDA_", "TPU_")
_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio")


def cache_folder() -> Path | None:
    """The folder, created if need be; None where nothing is to be kept or nothing can be written."""
    chosen = os.environ.get(SETTING)
    if chosen in ("", "0", "off"):
        return None
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "polygpt"
        folder = (Path(chosen) if chosen else base).expanduser().absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def keep_compiled_programs() -> None:
    """Has JAX keep what it compiles for later runs; must be called before JAX is imported.

    A setting of JAX's own that the user has made stays. The least recently used programs are deleted beyond
    `COMPILED_BYTES`.
    """
    folder = cache_folder()
    if folder is None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / f"programs-{processor()}")
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(COMPILED_BYTES))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def kept(question: Iterable[Any], compute: Callable[[], Any], keep: Callable[[Any], bool] = bool) -> Any:
    """`compute()`, which must be fit for JSON, or what it gave when the same `question` was asked before.

    `keep` says whether an answer depends on nothing but the question, the installation and the machine.
    """
    folder = cache_folder()
    if folder is None:
        return compute()
    digest = hashlib.blake2b(json.dumps([_installation(), *question]).encode(), digest_size=16)
    path = folder / "answers" / f"{digest.hexdigest()}.json"
    with suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    answer = compute()
    if keep(answer):
        with suppress(OSError):
            _write(path, json.dumps(answer))
    return answer


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    for old in sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)[:-ANSWERS]:
        old.unlink(missing_ok=True)


@cache
def _installation() -> list[Any]:
    """polygpt's own files, the packages it computes with, and the machine."""
    root = Path(__file__).parent
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".yaml"))
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    versions = [_version(name) for name in _PACKAGES]
    variables = sorted((name, value) for name, value in os.environ.items() if name.startswith(_VARIABLES))
    devices = [path for path in _DEVICES if os.path.exists(path)]
    return [digest.hexdigest(), platform.python_version(), versions, variables, devices, processor()]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def processor() -> str:
    """The kind of processor: a program compiled for one may crash on another that shares the home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    described = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return hashlib.blake2b("\n".join([platform.machine(), *(described or lines)]).encode(), digest_size=6).hexdigest()
