"""Small GGUF files written by the gguf package itself, whole or changed."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_zoo import LLAMA

from polygpt.errors import RequestError
from polygpt.interop import open_gguf

TINY = {
    **LLAMA,
    "embed_dim": 32,
    "num_layers": 1,
    "vocab_size": 8,
    "feedforward": {**LLAMA["feedforward"], "mlp_dim": 32},
}
TENSORS = {
    "token_embd.weight": (8, 32),
    "output_norm.weight": (32,),
    "blk.0.attn_norm.weight": (32,),
    "blk.0.attn_q.weight": (32, 32),
    "blk.0.attn_k.weight": (16, 32),
    "blk.0.attn_v.weight": (16, 32),
    "blk.0.attn_output.weight": (32, 32),
    "blk.0.ffn_norm.weight": (32,),
    "blk.0.ffn_gate.weight": (32, 32),
    "blk.0.ffn_up.weight": (32, 32),
    "blk.0.ffn_down.weight": (32, 32),
}
METADATA = {
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
WIDE = TENSORS | {"blk.0.attn_k.weight": (32, 32), "blk.0.attn_v.weight": (32, 32)}


def values_of(shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write(path: Path, metadata=(), tensors=TENSORS, kinds=(), architecture: str = "llama", without=()) -> Path:
    """A file of gguf's own writer; `kinds` gives a tensor another type, `without` leaves keys and tensors out."""
    writer, kinds = gguf.GGUFWriter(path, architecture), dict(kinds)
    for key, value in (METADATA | dict(metadata)).items():
        if key in without:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)
    for name, shape in tensors.items():
        if name not in without:
            kind = kinds.get(name, Kind.F32)
            writer.add_tensor(name, gguf.quantize(values_of(shape), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(path: Path) -> str:
    """The error, which must be short."""
    with pytest.raises(RequestError) as error:
        open_gguf(path)
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def tokens_of(**changes):
    """The metadata of a byte-level tokenizer of two letters, changed."""
    own = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["<|endoftext|>", "a", "b", "ab", "é", "Ġ", "Ċ", "ba"],
        "token_type": [3, 1, 1, 1, 1, 1, 1, 1],
        "merges": ["a b", "b a"],
        "eos_token_id": 0,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (own | changes).items() if value is not None}
