"""Checkpoints that are either whole and verified or not there.

A step is a folder `step_00000200/` with the arrays of each item in a folder of their own (Orbax), `info.json`
(whatever the caller wants to know when it goes on), and `manifest.json`, written last, with the size and SHA-256 of
every file. It is written under a temporary name and renamed at the end. What loads is the newest step whose files
all match; Orbax itself restores a flipped byte in silence three times of four.

Knows arrays and files; nothing of models or training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from polygpt.errors import PolygptError, RequestError
from polygpt.files import remove_folder

FORMAT = 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified step on disk."""

    folder: Path
    step: int
    info: dict[str, Any]


def save(root: Path, step: int, items: Mapping[str, PyTree], info: Mapping[str, Any], keep: int = 2) -> Checkpoint:
    """Writes `items` (each a tree of arrays) as step `step` below `root`; then leaves it and the `keep - 1` before it.

    Later steps stay: they failed verification, or training would not be here, and are for their owner to look at.

    Raises:
        PolygptError: the disk is full or refuses to be written; steps saved before are untouched.
    """
    final = root / _name(step)
    partial = root / f".{final.name}.partial"
    try:
        for left in root.glob(".step_*.partial"):  # by a process that was killed while it saved
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, tree in items.items():
            _write_arrays(partial / name, _flatten(tree))
        _write_json(partial / "info.json", dict(info))
        files = {str(path.relative_to(partial)): _fingerprint(path, sync=True) for path in _files(partial)}
        _write_json(partial / MANIFEST, {"format": FORMAT, "step": step, "files": files})
        if final.exists():  # a step that failed verification and was trained again
            shutil.rmtree(final)
        partial.rename(final)
        whole = [folder for number, folder in _step_folders(root) if number <= step and (folder / MANIFEST).is_file()]
        for old in whole[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, ValueError) as error:  # tensorstore reports a full disk as ValueError
        raise PolygptError(f"{final}: cannot be saved ({_reason(error)}); earlier checkpoints are intact") from error
    finally:
        remove_folder(partial)
    return Checkpoint(final, step, dict(info))


def newest(root: Path, warn: Callable[[str], None] = warnings.warn) -> Checkpoint | None:
    """The newest verified step below `root`, or None. Each newer one that fails is named through `warn`."""
    for _, folder in _step_folders(root):
        try:
            return verify(folder)
        except PolygptError as error:
            warn(f"{error}; trying the step before it")
    return None


def verify(folder: Path) -> Checkpoint:
    """Checks every file of a step against its manifest.

    Raises:
        PolygptError: a file is missing, of another size, or changed; the file is named.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        step, files = manifest["step"], manifest["files"]
        if manifest["format"] != FORMAT:
            raise PolygptError(f"{folder}: checkpoint format {manifest['format']}; this version reads {FORMAT}")
        if folder.name != _name(step):
            raise PolygptError(f"{folder}: holds step {step}, which its name does not say")
        for name, expected in files.items():
            if _fingerprint(folder / name) != expected:
                raise PolygptError(f"{folder / name}: does not match its SHA-256 in {MANIFEST}")
        return Checkpoint(folder, step, json.loads((folder / "info.json").read_text()))
    except FileNotFoundError as error:
        raise PolygptError(f"{folder}: incomplete checkpoint, {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PolygptError(f"{folder}: unreadable checkpoint ({error})") from None


def restore(checkpoint: Checkpoint, item: str, like: PyTree) -> PyTree:
    """The arrays of `item`, in the structure, shapes and dtypes of `like` (abstract or concrete arrays).

    Raises:
        RequestError: names, shapes or dtypes are not those of `like`; the first difference is named. Orbax by
            itself would cast float32 to bfloat16 in silence.
    """
    import orbax.checkpoint as ocp

    wanted = _flatten(like)
    folder = checkpoint.folder / item
    with _quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
        stored = {name: (tuple(m.shape), np.dtype(m.dtype)) for name, m in _metadata(checkpointer, folder).items()}
        expected = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in wanted.items()}
        for name in sorted(stored.keys() | expected.keys()):
            if stored.get(name) != expected.get(name):
                have, want = _spell(stored.get(name)), _spell(expected.get(name))
                raise RequestError(f"{folder}: {name} is {have} here, {want} in the model; load it with its own config")
        placement = SingleDeviceSharding(jax.local_devices()[0])
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or placement)
            for name, leaf in wanted.items()
        }
        arrays = checkpointer.restore(folder.absolute(), abstract)
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])


def _metadata(checkpointer: Any, folder: Path) -> dict[str, Any]:
    metadata = checkpointer.metadata(folder.absolute())
    return dict(getattr(metadata, "item_metadata", metadata))


def _spell(leaf: tuple[tuple[int, ...], np.dtype] | None) -> str:
    return "absent" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


def _write_arrays(folder: Path, arrays: dict[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp

    with _quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), arrays)


class _quiet_orbax:
    """Orbax logs every step of its work at INFO and warns of what `restore` checks for itself."""

    def __enter__(self) -> None:
        self.logger = logging.getLogger("absl")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)


def _flatten(tree: PyTree) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _fingerprint(path: Path, sync: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        if sync:  # a manifest must not reach the disk before what it vouches for
            os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, allow_nan=False))
        file.flush()
        os.fsync(file.fileno())


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _step_folders(root: Path) -> list[tuple[int, Path]]:
    """What is named like a step, newest first, with its number."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _STEP.fullmatch(path.name))]
    return sorted(found, reverse=True)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0][:200]
