"""Checkpoints on disk: a step is saved whole or not at all, and verified before it is loaded.

A step is a folder `step_00000200/` with two folders of arrays (Orbax), `params` and, where training can continue,
`optimizer`; `info.json` with the plain values of `Snapshot`; and `manifest.json`, written last, with the size and
SHA-256 of every file. The folder has a temporary name until it is complete. The newest step whose files all match is
the one that loads; Orbax alone restores a flipped byte silently three times out of four.

Knows arrays and files, nothing of models or training.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EACCES, EDQUOT, EFBIG, EIO, ENOSPC, EROFS
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from polygpt.errors import PolygptError, RequestError
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
        data: fingerprint of the training batches; the next batch is number `step`.
        recent_losses: of the last steps, for the mean that a run reports.
        tokens_per_second: training speed so far.
    """

    step: int
    params: PyTree
    optimizer: PyTree | None = None
    data: str | None = None
    recent_losses: tuple[float, ...] = ()
    tokens_per_second: float = 0.0

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
        return {name: getattr(self, name) for name in ("step", "data", "recent_losses", "tokens_per_second")}


@dataclass(frozen=True)
class Checkpoint:
    """A verified step on disk, its arrays not yet read."""

    folder: Path
    step: int
    info: dict[str, Any]


class NotFiniteError(PolygptError):
    """A value that should be a finite number is NaN or infinite."""


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
    with _quiet_orbax():
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
            raise PolygptError(f"{final}: cannot be saved ({_reason(error)}); {describe_saved(root)}") from error
        finally:
            remove_folder(partial)
    return Checkpoint(final, snapshot.step, snapshot.info)


def _write(folder: Path, snapshot: Snapshot) -> None:
    folder.mkdir(parents=True)
    for name, tree in snapshot.arrays.items():
        _write_arrays(folder / name, _flatten(tree))
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
    arrays = {name: _read_arrays(checkpoint.folder / name, tree) for name, tree in like.arrays.items()}
    state = arrays["optimizer"][0] if "optimizer" in arrays else None
    info = {name: value for name, value in checkpoint.info.items() if name in like.info}
    info["recent_losses"] = tuple(info.get("recent_losses", ()))
    return Snapshot(params=arrays["params"], optimizer=state, **info)


def _read_arrays(folder: Path, like: PyTree) -> PyTree:
    import orbax.checkpoint as ocp

    wanted = _flatten(like)
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
    check_finite(str(folder), arrays)
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])


def _metadata(checkpointer: Any, folder: Path) -> dict[str, Any]:
    metadata = checkpointer.metadata(folder.absolute())
    return dict(getattr(metadata, "item_metadata", metadata))


def _spell(leaf: tuple[tuple[int, ...], np.dtype] | None) -> str:
    return "absent" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


def check_finite(where: str, tree: PyTree) -> None:
    """Refuses arrays that hold NaN or infinity.

    Raises:
        NotFiniteError: an array does; `where` and its name are given.
    """
    for name, leaf in _flatten(tree).items():
        if jax.dtypes.issubdtype(leaf.dtype, np.inexact) and not _is_finite(leaf):
            raise NotFiniteError(f"{where}: {name} holds values that are not finite (NaN or infinity)")


def _is_finite(leaf: jax.Array) -> bool:
    # NumPy reads a CPU's array where it lies; compiling the test would take longer than the test.
    if isinstance(leaf, jax.Array) and next(iter(leaf.devices())).platform != "cpu":
        return bool(jnp.isfinite(leaf).all())
    return bool(np.isfinite(np.asarray(leaf)).all())


def _write_arrays(folder: Path, arrays: dict[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), arrays)


class _SaveLoop(asyncio.SelectorEventLoop):
    """An event loop that ignores callbacks after it is closed.

    When a write fails, TensorStore's threads report the others' end as late as at the interpreter's exit, and would
    print a traceback for each.
    """

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> asyncio.Handle | None:
        try:
            return super().call_soon_threadsafe(*args, **kwargs)
        except RuntimeError:
            if not self.is_closed():
                raise
        return None


class _SaveLoops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> _SaveLoop:
        return _SaveLoop()


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Silences Orbax, which logs every step of its work, warns of what `restore` checks itself, and logs the traceback
    of a failed write in several threads. The caller gets the one exception that matters.
    """
    logger, policy = logging.getLogger("absl"), asyncio.get_event_loop_policy()
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    asyncio.set_event_loop_policy(_SaveLoops())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(policy)
        logger.setLevel(level)


def _flatten(tree: PyTree) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


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
