"""Checkpoints on disk: a step is saved whole or not at all, and verified before it is loaded.

A step is a folder `step_00000200/` with two folders of arrays (Orbax), `params` and, where training can continue,
`training`; `info.json` with the plain values of `Snapshot`; and `manifest.json`, written last, with the size and
SHA-256 of every file. The folder has a temporary name until it is complete. The newest step whose files all match is
the one that loads; Orbax alone restores a flipped byte silently three times out of four.

Knows arrays and files, nothing of models or training.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from errno import EACCES, EDQUOT, EFBIG, EIO, ENOSPC, EROFS
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from polygpt.checkpoint.arrays import check_finite, flatten, quiet_orbax, read_arrays, write_arrays
from polygpt.checkpoint.snapshot import Snapshot, snapshot_of
from polygpt.distributed import exchange, is_main, main_decides
from polygpt.errors import PolygptError
from polygpt.files import remove_folder

FORMAT = 2
READABLE = (1, FORMAT)  # of format 1, the weights alone
MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified step on disk, its arrays not yet read; `resumable` if it holds a state of training, too."""

    folder: Path
    step: int
    info: dict[str, Any]
    resumable: bool = True


@dataclass(frozen=True)
class Keep:
    """Which steps are kept after a new one is saved.

    Attributes:
        last: how many of the newest.
        every: those whose number is a multiple of this; 0 for none.
        best: this one, if it is there.
    """

    last: int = 2
    every: int = 0
    best: int | None = None

    def __contains__(self, step: int) -> bool:
        """Whether `step` is kept however old it is."""
        return step == self.best or (self.every > 0 and step % self.every == 0)


def save(root: Path, snapshot: Snapshot, keep: Keep = Keep()) -> Checkpoint:
    """Writes a snapshot below `root`, then deletes earlier steps that `keep` does not name.

    Later steps stay: they failed verification, and their owner may want to look at them. Of several processes, all must
    call this: each writes the arrays that it holds, and process 0 the rest.

    Raises:
        NotFiniteError: an array holds NaN or infinity; it is named, and nothing is written.
        PolygptError: writing failed (a full disk, say); steps saved before are untouched.
    """
    final = root / _name(snapshot.step)
    # Unique, so that two processes never write, or remove, each other's.
    partial = root / main_decides("partial", lambda: f".{final.name}.{secrets.token_hex(4)}.partial")
    for name, tree in snapshot.arrays.items():
        check_finite(f"step {snapshot.step}: {name}", tree)
    with quiet_orbax():
        try:
            _write(partial, snapshot)
            if is_main():
                _complete(partial, final)
                _delete_old(root, snapshot.step, keep)
            exchange("saved", None)
        except (OSError, ValueError) as error:  # TensorStore reports a full disk as ValueError
            remove_folder(partial, settle=0.5)  # its threads may be at work still
            raise PolygptError(f"{final}: cannot be saved ({_reason(error)}); {describe_saved(root)}") from error
        finally:
            if is_main():
                remove_folder(partial)
    return Checkpoint(final, snapshot.step, snapshot.info, snapshot.training is not None)


def _complete(partial: Path, final: Path) -> None:
    """Gives a step that is written its name."""
    if final.exists():  # a step that failed verification and was trained again
        shutil.rmtree(final)
    partial.rename(final)
    _sync_folder(final.parent)


def _delete_old(root: Path, newest: int, keep: Keep) -> None:
    complete = [(number, folder) for number, folder in _complete_steps(root) if number <= newest]
    for number, folder in complete[keep.last :]:
        if number not in keep:
            shutil.rmtree(folder, ignore_errors=True)


def remove_partial(root: Path) -> None:
    """Removes what processes that were killed while saving left. The caller must be the only one to save here."""
    for left in root.glob(".step_*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def _write(folder: Path, snapshot: Snapshot) -> None:
    if is_main():
        folder.mkdir(parents=True)
    exchange("folder", None)
    for name, tree in snapshot.arrays.items():
        write_arrays(folder / name, flatten(tree))
    if not is_main():
        return
    _write_json(folder / "info.json", snapshot.info)
    files = {str(path.relative_to(folder)): _fingerprint(path, sync=True) for path in _files(folder)}
    _write_json(folder / MANIFEST, {"format": FORMAT, "step": snapshot.step, "files": files})
    for inner in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _sync_folder(inner)


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


def exists(root: Path, step: int) -> bool:
    """Whether `step` was saved completely below `root`; its files are not verified."""
    return (root / _name(step) / MANIFEST).is_file()


def step_folder(root: Path, step: int) -> Path:
    """The folder of `step` below `root`."""
    return root / _name(step)


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
        if manifest["format"] not in READABLE:
            known = " and ".join(map(str, READABLE))
            raise PolygptError(f"{folder}: checkpoint format {manifest['format']}; this version reads {known}")
        if folder.name != _name(step):
            raise PolygptError(f"{folder}: holds step {step}, which its name does not say")
        for name, expected in files.items():
            if _fingerprint(folder / name) != expected:
                raise PolygptError(f"{folder / name}: does not match its SHA-256 in {MANIFEST}")
        info = json.loads((folder / "info.json").read_text())
        return Checkpoint(folder, step, info, resumable=(folder / "training").is_dir())
    except FileNotFoundError as error:
        raise PolygptError(f"{folder}: incomplete checkpoint, {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PolygptError(f"{folder}: unreadable checkpoint ({error})") from None


def restore(checkpoint: Checkpoint, params: PyTree, training: PyTree | None = None, *, cast: bool = False) -> Snapshot:
    """Reads a step in the structure, shapes and dtypes of `params` and `training` (abstract or concrete arrays).

    Args:
        checkpoint: a verified step.
        params: the model's weights.
        training: everything else; None leaves it unread.
        cast: converts arrays of another dtype, which are refused otherwise. (Orbax alone would cast float32 to bfloat16
            silently.)

    Raises:
        RequestError: names, shapes or dtypes differ; each array that differs is named.
        NotFiniteError: an array holds NaN or infinity.
    """
    like = Snapshot(checkpoint.step, params, training)
    arrays = {name: read_arrays(checkpoint.folder / name, tree, cast) for name, tree in like.arrays.items()}
    return snapshot_of(checkpoint.info, arrays["params"], arrays.get("training"))


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _fingerprint(path: Path, sync: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        if sync:  # the manifest must not reach the disk before the files it lists
            os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync_folder(folder: Path) -> None:
    """Makes the names in a folder reach the disk, where the system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
