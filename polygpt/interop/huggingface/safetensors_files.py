"""The tensors of a Hugging Face folder: one safetensors file, or several that an index lists.

The library refuses oversized headers, truncation, overlap, holes and trailing bytes. This adds duplicate keys, tensors
that are in two files, and an index that points outside its folder.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path, PurePath

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from polygpt.errors import RequestError
from polygpt.interop.weights import FLOATS, TensorInfo
from polygpt.settings import read_json, unique

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
_HEADER_LIMIT = 100_000_000  # the library's own


class SafetensorsFolder:
    """A `TensorSource` over the safetensors files of a folder.

    `read` returns a memory map, so nothing is copied.

    Raises:
        RequestError: there are no files, or they are damaged; the file and the tensor are named.
    """

    def __init__(self, folder: Path):
        self.where = str(folder)
        self.places: dict[str, tuple[Path, int]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        listed = _listed(folder)
        for path, names in listed.items():
            found = _header(path)
            _check_whole(path)
            if names is not None and found.keys() != names:
                name = min(found.keys() ^ names)
                where = "in the file but not in" if name in found else "not in the file but in"
                raise RequestError(f"{path}: the tensor {name} is {where} {INDEX}")
            for name, (info, start) in found.items():
                if name in self.tensors:
                    raise RequestError(f"{path}: the tensor {name} is in {self.places[name][0].name} as well")
                self.tensors[name], self.places[name] = info, (path, start)

    def read(self, name: str) -> np.ndarray:
        (shape, dtype), (path, start) = self.tensors[name], self.places[name]
        try:
            return np.memmap(path, FLOATS[dtype], "r", start, shape).view(np.ndarray)
        except (OSError, ValueError) as error:  # the file has changed since it was opened
            raise RequestError(f"{path}: the tensor {name} cannot be read ({error})") from None


def _listed(folder: Path) -> dict[Path, set[str] | None]:
    """The files to open, each with its tensors by the index (None: no index is used).

    As in transformers a single file comes before an index, which may be left over from other weights.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if not index.is_file():
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.h5") for path in folder.glob(pattern))
        hint = f"; {others[0]} could run code when opened and is not read; save it as safetensors" if others else ""
        raise RequestError(f"{folder}: no {SINGLE} here{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError(f"{index}: no weight_map")
    files: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or PurePath(file).name != file
            or "\\" in file
            or not file.endswith(".safetensors")
        ):
            raise RequestError(
                f"{index}: {name} is said to be in {file!r}, which is not a safetensors file of this folder"
            )
        files.setdefault(folder / file, set()).add(name)
    missing = next((path for path in files if not path.is_file()), None)
    if missing is not None:
        raise RequestError(f"{folder}: {missing.name} is missing; {INDEX} lists it")
    return files


def _header(path: Path) -> dict[str, tuple[TensorInfo, int]]:
    """What a file says about its tensors, and the offset of each."""
    try:
        with path.open("rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            if size > min(_HEADER_LIMIT, path.stat().st_size):
                raise RequestError(f"{path}: not a safetensors file (its header would have {size:,} bytes)")
            header = json.loads(file.read(size), object_pairs_hook=unique)
        header.pop("__metadata__", None)
        return {
            name: (TensorInfo(tuple(info["shape"]), info["dtype"]), 8 + size + info["data_offsets"][0])
            for name, info in header.items()
        }
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    except (KeyError, TypeError, AttributeError):
        raise RequestError(f"{path}: not a safetensors file (its header is malformed)") from None
    except (struct.error, ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not a safetensors file ({str(error).splitlines()[0]})") from None


def _check_whole(path: Path) -> None:
    try:
        with safe_open(path, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{path}: a damaged safetensors file ({error})") from None


def write_safetensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes tensors into files of at most `shard_bytes` (a tensor is never split); several files get an index."""
    shards: list[tuple[Path, list[str]]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        path = folder / f"part-{len(shards)}.safetensors"
        path.touch()
        mode = path.stat().st_mode
        save_file(held, path, metadata={"format": "pt"})
        path.chmod(mode)  # the package makes the file readable by its owner only
        shards.append((path, list(held)))
        held.clear()

    for name, values in tensors:
        if held and sum(array.nbytes for array in held.values()) + values.nbytes > shard_bytes:
            flush()
        held[name] = values
        total += values.nbytes
    flush()
    if len(shards) == 1:
        shards[0][0].rename(folder / SINGLE)
        return
    weight_map = {}
    for number, (path, names) in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
