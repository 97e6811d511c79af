"""Checkpoints on disk: a step is saved whole or not at all, and verified before it is loaded.

A step is a folder `step_00000200/` with two folders of arrays (Orbax), `params` and, where training can continue,
`optimizer`; `info.json` with the plain values of `Snapshot`; and `manifest.json`, written last, with the size and
SHA-256 of every file. The folder has a temporary name until it is complete. The newest step whose files all match is
the one that loads; Orbax alone restores a flipped byte silently three times out of four.

Knows arrays and files, nothing of models or training.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from errno import EACCES, EDQUOT, EFBIG, EIO, ENOSPC, EROFS
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from polygpt.checkpoint.arrays import check_finite, flatten, quiet_orbax, read_arrays, write_arrays
from polygpt.errors import PolygptError
from polygpt.files import remove_folder

FORMAT = 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds.

    Attributes:
        step: updates done.
        params: the model's parameters.
        optimizer: the optimizer's state; None for a model alone, which cannot be resumed.
        data: fingerprint of the training batches; the next batch is number `step` + `batch_offset`.
        recent_losses: of the last steps, for the mean that a run reports.
        tokens_per_second: training speed so far.
        batch_offset: batches left out by rollbacks.
        rollbacks: how often the run has gone back to the newest periodic checkpoint.
    """

    step: int
    params: PyTree
    optimizer: PyTree | None = None
    data: str | None = None
    recent_losses: tuple[float, ...] = ()
    tokens_per_second: float = 0.0
    batch_offset: int = 0
    rollbacks: int = 0

    @property
    def arrays(self) -> dict[str, PyTree]:
        """The trees of arrays by the name of their folder."""
        items = {"params": self.params}
        if self.optimizer is not None:
            items["optimizer"] = (self.optimizer, jnp.int32(self.step))
        return items

    @property
    def info(self) -> dict[str, Any]:
        """The plain values, for `info.json`."""
        names = ("step", "data", "recent_losses", "tokens_per_second", "batch_offset", "rollbacks")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Checkpoint:
    """A verified step on disk, its arrays not yet read."""

    folder: Path
    step: int
    info: dict[str, Any]


def save(root: Path, snapshot: Snapshot, keep: int = 2) -> Checkpoint:
    """Writes a snapshot below `root`, then deletes all but it and the `keep - 1` steps before it.

    Later steps stay: they failed verification, and their owner may want to look at them.

    Raises:
        NotFiniteError: an array holds NaN or infinity; it is named, and nothing is written.
        PolygptError: writing failed (a full disk, say); steps saved before are untouched.
    """
    final = root / _name(snapshot.step)
    partial = root / f".{final.name}.partial"
    for name, tree in snapshot.arrays.items():
        check_finite(f"step {snapshot.step}: {name}", tree)
    with quiet_orbax():
        try:
            for left in root.glob(".step_*.partial"):  # by a process that was killed while saving
                shutil.rmtree(left, ignore_errors=True)
            _write(partial, snapshot)
            if final.exists():  # a step that failed verification and was trained again
                shutil.rmtree(final)
            partial.rename(final)
            complete = [folder for number, folder in _complete_steps(root) if number <= snapshot.step]
            for old in complete[keep:]:
                shutil.rmtree(old, ignore_errors=True)
        except (OSError, ValueError) as error:  # TensorStore reports a full disk as ValueError
            remove_folder(partial, settle=0.5)  # its threads may be at work still
            raise PolygptError(f"{final}: cannot be saved ({_reason(error)}); {describe_saved(root)}") from error
        finally:
            remove_folder(partial)
    return Checkpoint(final, snapshot.step, snapshot.info)


def _write(folder: Path, snapshot: Snapshot) -> None:
    folder.mkdir(parents=True)
    for name, tree in snapshot.arrays.items():
        write_arrays(folder / name, flatten(tree))
    _write_json(folder / "info.json", snapshot.info)
    files = {str(path.relative_to(folder)): _fingerprint(path, sync=True) for path in _files(folder)}
    _write_json(folder / MANIFEST, {"format": FORMAT, "step": snapshot.step, "files": files})


def verified(root: Path, warn: Callable[[str], None] = warnings.warn) -> Iterator[Checkpoint]:
    """The verified steps below `root`, the newest first; each that fails verification is named through `warn`."""
    for _, folder in _step_folders(root):
        try:
            yield verify(folder)
        except PolygptError as error:
            warn(f"{error}; trying the step before it")


def newest(root: Path, warn: Callable[[str], None] = warnings.warn) -> Checkpoint | None:
    """The newest verified step below `root`, or None. Each newer one that fails is named through `warn`."""
    return next(verified(root, warn), None)


def describe_saved(root: Path) -> str:
    """What a failed save leaves, for its error message."""
    return "earlier checkpoints are intact" if _complete_steps(root) else "no checkpoint has been saved"


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


def restore(checkpoint: Checkpoint, params: PyTree, optimizer: PyTree | None = None) -> Snapshot:
    """Reads a step in the structure, shapes and dtypes of `params` and `optimizer` (abstract or concrete arrays).

    Without `optimizer` its state is left unread.

    Raises:
        RequestError: names, shapes or dtypes differ; the first difference is named. (Orbax alone would cast float32
            to bfloat16 silently.)
        NotFiniteError: an array holds NaN or infinity.
    """
    like = Snapshot(checkpoint.step, params, optimizer)
    arrays = {name: read_arrays(checkpoint.folder / name, tree) for name, tree in like.arrays.items()}
    state = arrays["optimizer"][0] if "optimizer" in arrays else None
    info = {name: value for name, value in checkpoint.info.items() if name in like.info}
    info["recent_losses"] = tuple(info.get("recent_losses", ()))
    return Snapshot(params=arrays["params"], optimizer=state, **info)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _fingerprint(path: Path, sync: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        if sync:  # the manifest must not reach the disk before the files it lists
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
    """The folders (or files) named like a step, newest first, with their numbers."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _STEP.fullmatch(path.name))]
    return sorted(found, reverse=True)


def _complete_steps(root: Path) -> list[tuple[int, Path]]:
    """The steps that were saved completely, newest first; their files are not verified."""
    return [(number, folder) for number, folder in _step_folders(root) if (folder / MANIFEST).is_file()]


def _reason(error: Exception) -> str:
    """What the system said; TensorStore puts it at the end of a long message."""
    text = str(error)
    known = (os.strerror(number) for number in (ENOSPC, EDQUOT, EFBIG, EROFS, EACCES, EIO))
    return getattr(error, "strerror", None) or next((s for s in known if s in text), text.partition("\n")[0])
