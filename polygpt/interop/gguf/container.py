"""A GGUF file: its metadata and its tensors (github.com/ggml-org/ggml, docs/gguf.md).

The header is read here and not by the `gguf` package, whose reader trusts every count: a file of a hundred bytes that
claims 2^60 numbers makes it append empty arrays until memory runs out. Here nothing is allocated for a count before the
file is known to be long enough. The package decodes quantised values.
"""

from __future__ import annotations

import itertools
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from polygpt.errors import RequestError
from polygpt.interop.weights import TensorInfo

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DTYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")  # that can be read
_HEADER_LIMIT = 1 << 26  # bytes; the largest vocabularies take about twenty million
_ARRAY_LIMIT = 1 << 22  # entries
_COUNT_LIMIT = 1 << 18  # keys, and tensors
_NAME_LIMIT = 1 << 16  # bytes of a key or tensor name
_ALIGNMENT = 32  # by default
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


class StoredTensor(NamedTuple):
    """Where a tensor is in the file, and its type."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int


class GGUFFile:
    """A `TensorSource` over one file. Values are returned as float32, whatever their stored type.

    Attributes:
        where: the path.
        metadata: the keys with plain values.
        tensors: names with shape (the slowest axis first) and stored type.

    Raises:
        RequestError: it is not a GGUF file, is damaged, or has an unsupported type; the key or tensor is named.
    """

    def __init__(self, path: Path):
        self.where = str(path)
        self._data = _mapped(path)
        reader = _Reader(path, self._data)
        many_tensors, many_keys = reader.counts()
        self.metadata: dict[str, Any] = {}
        for _ in range(many_keys):
            key = reader.name("a key")
            if key in self.metadata:
                raise RequestError(f"{path}: duplicate key {key}")
            self.metadata[key] = reader.value(key)
        found = [reader.tensor() for _ in range(many_tensors)]
        self._stored = _located(path, found, self._alignment(reader.offset), len(self._data))
        self.tensors = {name: TensorInfo(stored.shape, stored.kind.name) for name, stored in self._stored.items()}

    def _alignment(self, end: int) -> tuple[int, int]:
        """The alignment of tensors, and the offset of the first after a header that ends at `end`."""
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise RequestError(f"{self.where}: general.alignment is {alignment!r}; it must be a power of two")
        return alignment, -(-end // alignment) * alignment

    def raw(self, name: str) -> np.ndarray:
        """The bytes of one tensor, as stored."""
        stored = self._stored[name]
        return self._data[stored.offset : stored.offset + stored.size]

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """The values of one tensor, or of its part at `index` of the first axis."""
        stored, raw = self._stored[name], self.raw(name)
        shape = stored.shape
        if index is not None:
            raw, shape = raw.reshape(shape[0], -1)[index], shape[1:]
        if stored.kind == GGMLQuantizationType.F32:
            return raw.view("<f4").reshape(shape)
        return dequantize(raw.reshape(*shape[:-1], -1), stored.kind).reshape(shape)


def _mapped(path: Path) -> np.ndarray:
    try:
        if not path.is_file():
            raise RequestError(f"{path}: no such file")
        if path.stat().st_size < 24:
            raise RequestError(f"{path}: not a GGUF file ({path.stat().st_size} bytes)")
        return np.memmap(path, np.uint8, "r").view(np.ndarray)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None


class _Reader:
    """Reads the header step by step, each time making sure that the file is long enough."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.offset = path, memoryview(data), 0
        self.end = min(len(data), _HEADER_LIMIT)

    def take(self, size: int, what: str) -> memoryview:
        if size > self.end - self.offset:
            limit = f"exceeds {_HEADER_LIMIT:,} bytes" if self.end == _HEADER_LIMIT else "is truncated"
            raise RequestError(f"{self.path}: the header {limit}, at {what}")
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def numbers(self, letter: str, count: int, what: str) -> tuple[Any, ...]:
        if count > self.end:  # before it becomes a format string
            self.take(count, what)
        return struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize(f"<{letter}"), what))

    def number(self, letter: str, what: str) -> int:
        return self.numbers(letter, 1, what)[0]

    def counts(self) -> tuple[int, int]:
        """The numbers of tensors and of keys."""
        magic = bytes(self.take(4, "its beginning"))
        if magic != MAGIC:
            raise RequestError(f"{self.path}: not a GGUF file (it begins with {magic!r})")
        version = self.number("I", "its version")
        if version & 0xFFFF == 0 and version:
            raise RequestError(f"{self.path}: it is big-endian, which is not supported; convert it to little-endian")
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise RequestError(f"{self.path}: GGUF version {version} is not known; known: {known}")
        tensors, keys = self.numbers("Q", 2, "its counts")
        # The fewest bytes that each takes: a tensor 8 + 4 + 8 + 4 + 8, a key 8 + 4 + 1.
        for count, least, what in ((tensors, 32, "tensors"), (keys, 13, "keys")):
            if count * least > self.end or count > _COUNT_LIMIT:
                raise RequestError(f"{self.path}: it claims {count:,} {what}, more than a file of its size can hold")
        return tensors, keys

    def text(self, what: str, limit: int = _HEADER_LIMIT) -> str:
        size = self.number("Q", what)
        if size > limit:
            raise RequestError(f"{self.path}: {what} would have {size:,} bytes")
        try:
            return str(self.take(size, what), "utf-8")
        except UnicodeDecodeError:
            raise RequestError(f"{self.path}: {what} is not UTF-8") from None

    def name(self, what: str) -> str:
        return self.text(what, _NAME_LIMIT)

    def value(self, key: str) -> Any:
        kind = self._value_kind(key)
        if kind != GGUFValueType.ARRAY:
            return self.values(kind, 1, key)[0]
        kind = self._value_kind(key)
        count = self.number("Q", key)
        if kind == GGUFValueType.ARRAY:
            raise RequestError(f"{self.path}: {key} is an array of arrays, which is not supported")
        if count > _ARRAY_LIMIT:
            raise RequestError(f"{self.path}: {key} has {count:,} entries; at most {_ARRAY_LIMIT:,} are read")
        return self.values(kind, count, key)

    def values(self, kind: GGUFValueType, count: int, key: str) -> list[Any]:
        if kind == GGUFValueType.STRING:
            return [self.text(key) for _ in range(count)]
        numbers = self.numbers(_SCALARS[kind], count, key)
        return [shortest(v) for v in numbers] if kind == GGUFValueType.FLOAT32 else list(numbers)

    def _value_kind(self, key: str) -> GGUFValueType:
        number = self.number("I", key)
        try:
            return GGUFValueType(number)
        except ValueError:
            raise RequestError(f"{self.path}: {key} has the value type {number}, which is not known") from None

    def tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        """Name, shape, type and offset from where tensors begin."""
        name = self.name("a tensor name")
        axes = self.number("I", name)
        if axes > 4:
            raise RequestError(f"{self.path}: the tensor {name} has {axes} axes; GGUF has at most 4")
        shape = self.numbers("Q", axes, name)[::-1]
        number = self.number("I", name)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise RequestError(f"{self.path}: the tensor {name} has the type {number}, which is not known") from None
        return name, shape, kind, self.number("Q", name)


def shortest(value: float) -> float:
    """The shortest decimal with the same float32: 1e-5 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _located(path: Path, found: list, alignment: tuple[int, int], file_size: int) -> dict[str, StoredTensor]:
    """The tensors by name; each is complete and none overlap."""
    step, first = alignment
    stored: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in found:
        if name in stored:
            raise RequestError(f"{path}: duplicate tensor {name}")
        block, size = GGML_QUANT_SIZES[kind]
        count = math.prod(shape)
        if count < 1 or (shape[-1:] and shape[-1] % block):
            raise RequestError(f"{path}: the tensor {name} is {list(shape)}, which {kind.name} cannot be")
        stored[name] = StoredTensor(shape, kind, first + offset, count // block * size)
        end = first + offset + stored[name].size
        if offset % step:
            raise RequestError(f"{path}: the tensor {name} is at offset {offset}, not a multiple of {step}")
        if end > file_size:
            raise RequestError(
                f"{path}: the tensor {name} ends at byte {end:,} of {file_size:,}; the file is truncated"
            )
    ordered = sorted(stored.items(), key=lambda item: item[1].offset)
    for (name, first_tensor), (other, second) in itertools.pairwise(ordered):
        if first_tensor.offset + first_tensor.size > second.offset:
            raise RequestError(f"{path}: the tensors {name} and {other} overlap")
    return stored
