"""llama2.c's first format: seven integers, then float32 values; the tokenizer is in another file of the folder.

After `run.c` and `export.py` (`legacy_export`) of github.com/karpathy/llama2.c. Nothing in the file says what it is, so
its size must be exactly what the seven integers require.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.interop.names import Layout, foreign_tensors
from polygpt.interop.stored import StoredModel
from polygpt.interop.weights import TensorInfo, check_tensors, read_params
from polygpt.model import ModelConfig, model_of
from polygpt.tokenizers import SPACE, PieceKind, Tokenizer, score_bpe

_MAGIC = 0x616B3432  # begins its later formats
_UNKNOWN, _START, _END = 0, 1, 2  # ids; those of the 256 bytes follow
_TOKENIZER_LIMIT = 1 << 26  # bytes
# Meta's names, which llama2.c uses too.
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
    """The seven integers; a negative vocabulary means that the head is not tied to the embedding."""

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
        """The tensors in the order of the file; a name with `{layer}` stands for one tensor per layer."""
        width, layer = self.dim, "layers.{layer}."
        kv_width = width * self.n_kv_heads // self.n_heads
        angles = (self.max_seq_len, width // self.n_heads // 2)
        shapes: dict[str, tuple[int, ...]] = {
            "tok_embeddings.weight": (self.vocabulary, width),
            f"{layer}attention_norm.weight": (width,),
            f"{layer}attention.wq.weight": (width, width),
            f"{layer}attention.wk.weight": (kv_width, width),
            f"{layer}attention.wv.weight": (kv_width, width),
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
        RequestError: it is not such a file, or is truncated.
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
        self._offsets: dict[str, int] = {}
        # Summed before any name is expanded, since a damaged header may claim 2^31 layers.
        expected = len(head)
        for name, shape in self.header.shapes().items():
            expected += 4 * math.prod(shape) * (self.header.n_layers if "{layer}" in name else 1)
        if expected != size:
            raise RequestError(
                f"{path}: {size:,} bytes, but its first seven integers {tuple(self.header)} require {expected:,}; "
                "it is truncated, or not in llama2.c's first format"
            )
        offset = len(head)
        for name, shape in self.header.shapes().items():
            for layer in range(self.header.n_layers) if "{layer}" in name else (0,):
                full = name.format(layer=layer)
                self.tensors[full], self._offsets[full] = TensorInfo(shape, "F32"), offset
                offset += 4 * math.prod(shape)
        self._data = np.memmap(path, np.uint8, "r")

    def read(self, name: str) -> np.ndarray:
        shape, offset = self.tensors[name].shape, self._offsets[name]
        return self._data[offset : offset + 4 * math.prod(shape)].view("<f4").reshape(shape)


def _check_header(path: Path, head: bytes) -> _Header:
    if len(head) < 4 * len(_Header._fields):
        raise RequestError(f"{path}: {len(head)} bytes, too few for llama2.c's seven integers")
    header = _Header(*struct.unpack("<7i", head))
    if header.dim == _MAGIC:
        raise RequestError(f"{path}: a newer format of llama2.c; export it with --version 0 (its legacy format)")
    for name, value in header._asdict().items():
        if value == 0 or (value < 0 and name != "vocab_size"):
            raise RequestError(f"{path}: {name} is {value:,}; this is not in llama2.c's first format")
    fits = header.dim % (2 * header.n_heads) == 0 and header.n_heads % header.n_kv_heads == 0
    if not fits:
        raise RequestError(
            f"{path}: {header.n_heads} heads and {header.n_kv_heads} key heads do not divide dim={header.dim}; "
            "this is not in llama2.c's first format"
        )
    return header


def open_llama2c(path: Path) -> StoredModel:
    """The model in a file of llama2.c's first format, with the tokenizer of the folder's `tok*.bin`.

    Raises:
        RequestError: the file is damaged, or no tokenizer in its folder belongs to it.
    """
    source = _Legacy(path)
    config = validate(ModelConfig, _fields(source.header), str(path))
    tensors = foreign_tensors(model_of(config), _NAMES, _LAYOUT)
    check_tensors(source, tensors, ignored=r"freqs_(cos|sin)")
    facts = {"format": "llama2.c", "architecture": "llama", "source": str(path)}
    tokenizer = _find_tokenizer(path, source.header.vocabulary)
    return StoredModel(
        config, partial(read_params, source, tensors), tokenizer, (_END,) if tokenizer else (), facts=facts
    )


def _fields(header: _Header) -> dict[str, Any]:
    """The model's configuration. RoPE's base 10000 and the norms' epsilon 1e-5 are constants of `run.c`."""
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
    """The folder's tokenizer of `size` tokens; None if there is no `tok*.bin` at all."""
    errors = []
    for candidate in sorted(path.parent.glob("tok*.bin")):
        if candidate == path:
            continue
        try:
            return _read_tokenizer(candidate, size)
        except RequestError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return None


def _read_tokenizer(path: Path, size: int) -> Tokenizer:
    """A tokenizer file of llama2.c: the length of the longest piece, then score, length and bytes of each piece."""
    try:
        if path.stat().st_size > _TOKENIZER_LIMIT:
            raise RequestError(
                f"{path}: {path.stat().st_size:,} bytes exceed the limit of {_TOKENIZER_LIMIT:,} for a tokenizer"
            )
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    scores, pieces, offset = [], [], 4
    try:
        while offset < len(data) and len(pieces) <= size:
            score, length = struct.unpack_from("<fi", data, offset)
            offset += 8 + length
            if not 0 <= length <= len(data) or offset > len(data):
                raise RequestError(f"{path}: token {len(pieces)} is truncated")
            scores.append(score)
            pieces.append(data[offset - length : offset].decode())
    except (struct.error, UnicodeDecodeError):
        raise RequestError(f"{path}: token {len(pieces)} is not UTF-8; this is not a tokenizer of llama2.c") from None
    if len(pieces) != size:
        count = "more" if len(pieces) > size else len(pieces)
        raise RequestError(f"{path}: {count} tokens, but the model has {size}; put the model's own tokenizer there")
    return _assemble(path, pieces, scores)


def _assemble(path: Path, pieces: list[str], scores: list[float]) -> Tokenizer:
    if len(pieces) < _END + 257:
        raise RequestError(f"{path}: {len(pieces)} tokens; three special ones and the 256 bytes are required")
    pieces = [piece.replace(" ", SPACE) for piece in pieces]
    # llama2.c writes these two with newlines around them.
    pieces[_START], pieces[_END] = pieces[_START].strip("\n"), pieces[_END].strip("\n")
    if len(set(pieces)) < len(pieces):
        twice, _ = Counter(pieces).most_common(1)[0]
        raise RequestError(f"{path}: duplicate token {twice!r}")
    if not all(math.isfinite(score) for score in scores):
        raise RequestError(f"{path}: a score is not finite")
    kinds = [PieceKind.UNKNOWN, PieceKind.CONTROL, PieceKind.CONTROL, *[PieceKind.BYTE] * 256]
    kinds += [PieceKind.NORMAL] * (len(pieces) - len(kinds))
    try:
        return Tokenizer(score_bpe(pieces, scores, kinds, start=_START))
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
