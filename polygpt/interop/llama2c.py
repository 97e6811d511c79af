"""llama2.c's first format: seven whole numbers, then one float32 after another; a tokenizer in a file beside it.

Read from `run.c` and `export.py` (`legacy_export`) of github.com/karpathy/llama2.c. Nothing in the file says what it
is, so its size must be exactly what its numbers ask for.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.interop.names import Layout, foreign_tensors
from polygpt.interop.stored import StoredModel
from polygpt.interop.weights import TensorInfo, check, read_params
from polygpt.kernels import WeightType
from polygpt.model import Model, ModelConfig, Params
from polygpt.tokenizers import SPACE, PieceKind, Tokenizer, score_bpe

_MAGIC = 0x616B3432  # of its later formats
_UNKNOWN, _START, _END = 0, 1, 2  # ids; the 256 bytes follow
_TOKENIZER_LIMIT = 1 << 26  # bytes
# Meta's names, which are llama2.c's own.
_NAMES = {
    "tok_embeddings.weight": "embedding",
    "norm.weight": "final_norm.gain",
    "output.weight": "head",
    "layers.{layer}.attention_norm.weight": "blocks.attention_norm.gain",
    "layers.{layer}.attention.wq.weight": "blocks.attention.query",
    "layers.{layer}.attention.wk.weight": "blocks.attention.key",
    "layers.{layer}.attention.wv.weight": "blocks.attention.value",
    "layers.{layer}.attention.wo.weight": "blocks.attention.out",
    "layers.{layer}.ffn_norm.weight": "blocks.feedforward_norm.gain",
    "layers.{layer}.feed_forward.w1.weight": "blocks.feedforward.gate",
    "layers.{layer}.feed_forward.w2.weight": "blocks.feedforward.down",
    "layers.{layer}.feed_forward.w3.weight": "blocks.feedforward.up",
}
_LAYOUT = Layout(interleaved=frozenset({"blocks.attention.query", "blocks.attention.key"}))


class _Header(NamedTuple):
    """The seven numbers; a negative vocabulary says that the head is not the embedding."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    max_seq_len: int

    @property
    def vocabulary(self) -> int:
        return abs(self.vocab_size)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors in the order of the file; a name with `{layer}` stands for one of each layer."""
        width, layer = self.dim, "layers.{layer}."
        narrow = width * self.n_kv_heads // self.n_heads
        angles = (self.max_seq_len, width // self.n_heads // 2)
        shapes: dict[str, tuple[int, ...]] = {
            "tok_embeddings.weight": (self.vocabulary, width),
            f"{layer}attention_norm.weight": (width,),
            f"{layer}attention.wq.weight": (width, width),
            f"{layer}attention.wk.weight": (narrow, width),
            f"{layer}attention.wv.weight": (narrow, width),
            f"{layer}attention.wo.weight": (width, width),
            f"{layer}ffn_norm.weight": (width,),
            f"{layer}feed_forward.w1.weight": (self.hidden_dim, width),
            f"{layer}feed_forward.w2.weight": (width, self.hidden_dim),
            f"{layer}feed_forward.w3.weight": (self.hidden_dim, width),
            "norm.weight": (width,),
            "freqs_cos": angles,
            "freqs_sin": angles,
        }
        return shapes | ({"output.weight": (self.vocabulary, width)} if self.vocab_size < 0 else {})


class _Legacy:
    """A `TensorSource` over the file.

    Raises:
        RequestError: it is not such a file, or not whole.
    """

    def __init__(self, path: Path):
        self.where = str(path)
        try:
            with path.open("rb") as file:
                head = file.read(4 * len(_Header._fields))
            size = path.stat().st_size
        except OSError as error:
            raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
        self.header = _check_header(path, head)
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, int] = {}
        place = len(head)
        for name, shape in self.header.shapes().items():
            many = self.header.n_layers if "{layer}" in name else 1
            # No name is written down before the size is known to be right: the header may ask for 2^31 layers.
            place += 4 * many * math.prod(shape)
        if place != size:
            raise RequestError(
                f"{path}: {size:,} bytes, where its first seven numbers {tuple(self.header)} ask for {place:,}; "
                "it is cut off, or not of llama2.c's first format"
            )
        place = len(head)
        for name, shape in self.header.shapes().items():
            for layer in range(self.header.n_layers) if "{layer}" in name else (0,):
                full = name.format(layer=layer)
                self.tensors[full], self._places[full] = TensorInfo(shape, "F32"), place
                place += 4 * math.prod(shape)
        self._data = np.memmap(path, np.uint8, "r")

    def read(self, name: str) -> np.ndarray:
        shape, place = self.tensors[name].shape, self._places[name]
        return self._data[place : place + 4 * math.prod(shape)].view("<f4").reshape(shape)


def _check_header(path: Path, head: bytes) -> _Header:
    if len(head) < 4 * len(_Header._fields):
        raise RequestError(f"{path}: {len(head)} bytes, too few for llama2.c's seven numbers")
    header = _Header(*struct.unpack("<7i", head))
    if header.dim == _MAGIC:
        raise RequestError(f"{path}: a newer format of llama2.c; export it with --version 0 (its legacy format)")
    for name, value in header._asdict().items():
        if value == 0 or (value < 0 and name != "vocab_size"):
            raise RequestError(f"{path}: {name} is {value:,}; this is not llama2.c's first format")
    fits = header.dim % (2 * header.n_heads) == 0 and header.n_heads % header.n_kv_heads == 0
    if not fits:
        raise RequestError(
            f"{path}: {header.n_heads} heads, {header.n_kv_heads} of keys, cannot share a width of {header.dim}; "
            "this is not llama2.c's first format"
        )
    return header


def open_llama2c(path: Path) -> StoredModel:
    """The model in a file of llama2.c's first format, with the tokenizer of `tok*.bin` beside it.

    Raises:
        RequestError: the file is not whole, or the tokenizers beside it are not this model's.
    """
    source = _Legacy(path)
    config = validate(ModelConfig, _fields(source.header), str(path))
    table = foreign_tensors(Model(config), _NAMES, _LAYOUT)
    check(source, table, ignored=r"freqs_(cos|sin)")

    def read(asked: ModelConfig, on_progress: Callable[[int], None], weights: WeightType | None = None) -> Params:
        return read_params(Model(asked), source, table, on_progress, weights)

    facts = {"format": "llama2.c", "architecture": "llama", "source": str(path)}
    tokenizer = _find_tokenizer(path, source.header.vocabulary)
    return StoredModel(config, read, tokenizer, (_END,) if tokenizer else (), facts=facts)


def _fields(header: _Header) -> dict[str, Any]:
    """What the numbers do not say, `run.c` has as constants: RoPE's base 10000, the norms' epsilon 1e-5."""
    return {
        "vocab_size": header.vocabulary,
        "context_length": header.max_seq_len,
        "embed_dim": header.dim,
        "num_layers": header.n_layers,
        "position": {"kind": "rope", "theta": 10000.0},
        "norm": {"kind": "rmsnorm", "eps": 1e-5},
        "attention": {"kind": "softmax", "num_heads": header.n_heads, "num_kv_heads": header.n_kv_heads},
        "feedforward": {"kind": "glu", "mlp_dim": header.hidden_dim, "activation": "silu"},
        "head": "untied" if header.vocab_size < 0 else "tied",
    }


def _find_tokenizer(path: Path, size: int) -> Tokenizer | None:
    """The tokenizer of `size` tokens beside the model; None where there is no `tok*.bin` at all."""
    complaints = []
    for beside in sorted(path.parent.glob("tok*.bin")):
        if beside == path:
            continue
        try:
            return _read_tokenizer(beside, size)
        except RequestError as error:
            complaints.append(str(error))
    if complaints:
        raise RequestError(complaints[0])
    return None


def _read_tokenizer(path: Path, size: int) -> Tokenizer:
    """llama2.c's tokenizer file: the longest piece's length, then score, length and bytes of each piece."""
    try:
        if path.stat().st_size > _TOKENIZER_LIMIT:
            raise RequestError(f"{path}: {path.stat().st_size:,} bytes is too much for a tokenizer")
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    scores, pieces, place = [], [], 4
    try:
        while place < len(data) and len(pieces) <= size:
            score, length = struct.unpack_from("<fi", data, place)
            place += 8 + length
            if not 0 <= length <= len(data) or place > len(data):
                raise RequestError(f"{path}: token {len(pieces)} is cut off")
            scores.append(score)
            pieces.append(data[place - length : place].decode())
    except (struct.error, UnicodeDecodeError):
        raise RequestError(f"{path}: token {len(pieces)} is no text; this is not llama2.c's tokenizer") from None
    if len(pieces) != size:
        count = "more" if len(pieces) > size else len(pieces)
        raise RequestError(f"{path}: a tokenizer of {count} tokens, where the model has {size}; put its own beside it")
    return _assemble(path, pieces, scores)


def _assemble(path: Path, pieces: list[str], scores: list[float]) -> Tokenizer:
    if len(pieces) < _END + 257:
        raise RequestError(f"{path}: {len(pieces)} tokens; there must be three special ones and the 256 bytes")
    pieces = [piece.replace(" ", SPACE) for piece in pieces]
    # llama2.c writes the two with newlines around them.
    pieces[_START], pieces[_END] = pieces[_START].strip("\n"), pieces[_END].strip("\n")
    if len(set(pieces)) < len(pieces):
        twice, _ = Counter(pieces).most_common(1)[0]
        raise RequestError(f"{path}: the token {twice!r} stands there twice")
    if not all(math.isfinite(score) for score in scores):
        raise RequestError(f"{path}: a score is not a finite number")
    kinds = [PieceKind.UNKNOWN, PieceKind.CONTROL, PieceKind.CONTROL, *[PieceKind.BYTE] * 256]
    kinds += [PieceKind.NORMAL] * (len(pieces) - len(kinds))
    try:
        return Tokenizer(score_bpe(pieces, scores, kinds, start=_START))
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
