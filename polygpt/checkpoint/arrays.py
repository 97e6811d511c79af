"""Trees of arrays in folders, written and read by Orbax, and the refusal of numbers that are not finite."""

from __future__ import annotations

import asyncio
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from polygpt.distributed import exchange
from polygpt.errors import PolygptError, RequestError


class NotFiniteError(PolygptError):
    """A value that should be a finite number is NaN or infinite."""


def read_arrays(folder: Path, like: PyTree, cast: bool = False) -> PyTree:
    """The arrays in `folder`, in the structure, shapes and dtypes of `like`.

    Raises:
        RequestError: names or shapes differ, or dtypes without `cast`; each array that differs is named.
        NotFiniteError: an array holds NaN or infinity.
    """
    import orbax.checkpoint as ocp

    wanted = flatten(like)
    with quiet_orbax(), _plain(folder) as plain, ocp.StandardCheckpointer() as checkpointer:
        stored = {name: (tuple(m.shape), np.dtype(m.dtype)) for name, m in _metadata(checkpointer, plain).items()}
        expected = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in wanted.items()}
        _check_same(folder, stored, expected, cast)
        placement = SingleDeviceSharding(jax.local_devices()[0])
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or placement)
            for name, leaf in wanted.items()
        }
        arrays = checkpointer.restore(plain, abstract) if abstract else {}
    check_finite(str(folder), arrays)
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])


_Leaves = dict[str, tuple[tuple[int, ...], np.dtype]]


def _check_same(folder: Path, stored: _Leaves, expected: _Leaves, cast: bool) -> None:
    """Refuses stored arrays that are not the expected ones; all that differ are named, up to ten."""
    differ = [name for name in sorted(stored.keys() | expected.keys()) if stored.get(name) != expected.get(name)]
    same_but_dtype = [n for n in differ if n in stored and n in expected and stored[n][0] == expected[n][0]]
    if not differ or (cast and differ == same_but_dtype):
        return
    named = [f"{name} is {_spell(stored.get(name))} here, {_spell(expected.get(name))} in the model" for name in differ]
    more = [f"and {len(named) - 10} more"] if len(named) > 10 else []
    fix = "load it with its own config"
    if differ == same_but_dtype:
        fix += " (checkpoint.restore converts dtypes with cast=True)"
    raise RequestError(f"{folder}: {'; '.join([*named[:10], *more])}; {fix}")


def _metadata(checkpointer: Any, folder: Path) -> dict[str, Any]:
    metadata = checkpointer.metadata(folder)
    return dict(getattr(metadata, "item_metadata", metadata))


def _spell(leaf: tuple[tuple[int, ...], np.dtype] | None) -> str:
    return "absent" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


def check_finite(where: str, tree: PyTree) -> None:
    """Refuses arrays that hold NaN or infinity.

    Where arrays are spread over several processes, each looks at what it holds, and all come to the same conclusion.

    Raises:
        NotFiniteError: an array does; `where` and its name are given.
    """
    leaves = flatten(tree)
    floats = (name for name, leaf in leaves.items() if jax.dtypes.issubdtype(leaf.dtype, np.inexact))
    name = next((name for name in floats if not _is_finite(leaves[name])), None)
    if any(not getattr(leaf, "is_fully_addressable", True) for leaf in leaves.values()):
        name = next((found for found in exchange("finite", name) if found is not None), None)
    if name is not None:
        raise NotFiniteError(f"{where}: {name} holds values that are not finite (NaN or infinity)")


def _is_finite(leaf: jax.Array) -> bool:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return all(_is_finite(shard.data) for shard in leaf.addressable_shards)
    # NumPy reads a CPU's array in place; compiling the test would take longer than the test itself.
    if isinstance(leaf, jax.Array) and next(iter(leaf.devices())).platform != "cpu":
        return bool(jnp.isfinite(leaf).all())
    return bool(np.isfinite(np.asarray(leaf)).all())


def write_arrays(folder: Path, arrays: dict[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp

    with _plain(folder) as plain, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(plain, arrays)


@contextmanager
def _plain(folder: Path) -> Iterator[Path]:
    """A path of `folder` that Orbax and TensorStore take as it is.

    They search for files by patterns and take addresses like `gs:` apart, so a folder below `run[1]` was saved without
    a part of its arrays. Such a folder is reached through a link.
    """
    folder = folder.absolute()
    if not re.search(r"[^\w./ -]", str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="polygpt-") as temporary:
        link = Path(temporary) / "link"
        link.symlink_to(folder.parent, target_is_directory=True)
        yield link / folder.name


class _SaveLoop(asyncio.SelectorEventLoop):
    """An event loop that ignores callbacks after it is closed, and exceptions that nobody waits for.

    When a write fails, TensorStore's threads report the others' end as late as at the interpreter's exit, and would
    print a traceback for each; so would asyncio for each other write that has failed. Orbax raises the first.
    """

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> asyncio.Handle | None:
        try:
            return super().call_soon_threadsafe(*args, **kwargs)
        except RuntimeError:
            if not self.is_closed():
                raise
        return None

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        pass


class _SaveLoops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> _SaveLoop:
        return _SaveLoop()


@contextmanager
def quiet_orbax() -> Iterator[None]:
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


def flatten(tree: PyTree) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
