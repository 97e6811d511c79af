"""GGUF files that are damaged, or say what is not known: each is refused by name."""

import struct
from contextlib import suppress
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import METADATA, TENSORS, TINY, refused, tokens_of, write
from gguf_zoo import lively, tokenizer
from hypothesis import given
from hypothesis import strategies as st

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.interop import export_gguf, open_gguf
from polygpt.model import ModelConfig


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"llama.attention.causal": False}, "'llama.attention.causal' is False"),
        ({"llama.rope.scaling.type": "longrope"}, "'llama.rope.scaling.type' is 'longrope'"),
        ({"llama.rope.dimension_count": 4}, "'llama.rope.dimension_count' is 4"),
        ({"llama.attention.value_length": 4}, "'llama.attention.value_length' is 4"),
        ({"llama.attention.head_count": 0}, "'llama.attention.head_count' is 0"),
        ({"llama.attention.head_count": 2**31}, "num_heads|head"),
        ({"llama.attention.sliding_window": 8}, "'llama.attention.sliding_window' is 8"),
        ({"llama.block_count": 2**32 - 1}, "'llama.block_count' is 4,294,967,295, but there are only 11 tensors"),
        ({"llama.block_count": 2**31 - 1}, "'llama.block_count' is 2,147,483,647, but there are only 11 tensors"),
        ({"llama.expert_count": 2**31 - 1, "llama.expert_used_count": 1}, "'llama.expert_count' is 2,147,483,647, but"),
        ({"llama.embedding_length": 2**32 - 1}, "llama.gguf|token_embd|model.gguf"),
        ({"llama.feed_forward_length": 2**31 - 1}, "ffn_gate.weight is"),
        ({"llama.attention.key_length": 2**31 - 2, "llama.attention.value_length": 2**31 - 2}, "attn_q.weight is"),
        ({"llama.attention.head_count_kv": 0}, "num_kv_heads"),
        ({"llama.rope.freq_base": 0.0}, "theta"),
        ({"llama.block_count": 2}, "blk.1.attn_norm.weight is missing"),
        ({"llama.embedding_length": 64}, "token_embd.weight is \\[8, 32\\]"),
        ({"llama.embedding_length": "64"}, "'llama.embedding_length' is '64'"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_epsilon"),
        ({"llama.invented": 1}, "'llama.invented' \\(1\\) is not known"),
        ({"split.count": 3}, "one of 3 files"),
        ({"general.alignment": 48}, "general.alignment is 48"),
        ({"tokenizer.ggml.model": "bert"}, "'tokenizer.ggml.model' is 'bert'"),
        ({"tokenizer.ggml.model": "gpt2"}, "'tokenizer.ggml.tokens' is missing"),
    ],
)
def test_a_setting_that_is_not_known_is_refused_by_name(tmp_path, metadata, reason):
    with pytest.raises(RequestError, match=reason):
        open_gguf(write(tmp_path / "model.gguf", metadata))


@pytest.mark.parametrize("key", [key for key in METADATA if not key.endswith("_kv")])
def test_a_setting_that_is_missing_is_named(tmp_path, key):
    assert f"'{key}' is missing" in refused(write(tmp_path / "model.gguf", without=[key]))


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_is_missing_or_wrong_is_named(tmp_path, name):
    assert name in refused(write(tmp_path / "missing.gguf", without=[name]))
    shape = TENSORS[name]
    wrong = write(tmp_path / "wrong.gguf", tensors=TENSORS | {name: (*shape[:-1], shape[-1] + 32)})
    assert name in refused(wrong)
    assert f"{name} is I8" in refused(with_type(write(tmp_path / "type.gguf"), name, Kind.I8))


def with_type(path: Path, name: str, kind: int) -> Path:
    data = bytearray(path.read_bytes())
    place = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    axes = struct.unpack_from("<I", data, place)[0]
    struct.pack_into("<I", data, place + 4 + 8 * axes, kind)
    path.write_bytes(data)
    return path


def test_types_architectures_and_tensors_that_are_not_known_are_named(tmp_path):
    assert "type 9999" in refused(with_type(write(tmp_path / "a.gguf"), "output_norm.weight", 9999))
    assert "'mamba'" in refused(write(tmp_path / "b.gguf", architecture="mamba"))
    assert "extra.weight [4]" in refused(write(tmp_path / "c.gguf", tensors=TENSORS | {"extra.weight": (4,)}))
    factors = write(tmp_path / "d.gguf", tensors=TENSORS | {"rope_freqs.weight": (4,)})
    assert "rope_freqs.weight" in refused(factors)


def test_files_that_are_none_are_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "none.gguf")
    assert "no such file" in refused(tmp_path)
    for content, reason in (
        (b"", "0 bytes"),
        (b"GGUF", "4 bytes"),
        (b"PK\3\4" + bytes(40), "it begins with b'PK"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(8), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(8), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(8), "1,152,921,504,606,846,976 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(8), "keys"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60) + bytes(8), "a key would have"),
        (header(9, struct.pack("<IQ", 0, 2**60)), "entries"),
        (header(9, struct.pack("<IQ", 8, 2**60)), "entries"),
        (header(9, struct.pack("<IQ", 8, 2**22)), "truncated"),
        (header(9, struct.pack("<IQ", 12, 2**22)), "truncated"),
        (header(9, struct.pack("<IQ", 9, 1)), "array of arrays"),
        (header(8, struct.pack("<Q", 2**63)), "would have"),
        (header(8, struct.pack("<Q", 1) + b"\xff"), "not UTF-8"),
        (header(99, b""), "value type 99"),
    ):
        (tmp_path / "bad.gguf").write_bytes(content)
        assert reason in refused(tmp_path / "bad.gguf")


def header(kind: int, value: bytes) -> bytes:
    """A file with one key, `k`, of that type and value."""
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", kind) + value


def test_what_stands_twice_or_over_another_is_refused(tmp_path):
    whole = write(tmp_path / "model.gguf").read_bytes()
    for old, new, reason in (
        (b"llama.block_count", b"llama.extra_count", "block_count"),
        (b"llama.feed_forward_length", b"llama.embedding_length\0\0\0", "length"),
        (b"blk.0.ffn_gate.weight", b"blk.0.ffn_down.weight", "duplicate tensor blk.0.ffn_down.weight"),
        (b"blk.0.attn_k.weight", b"blk.0.attn_v.weight", "duplicate tensor blk.0.attn_v.weight"),
    ):
        (tmp_path / "bad.gguf").write_bytes(whole.replace(old, new[: len(old)], 1))
        assert reason in refused(tmp_path / "bad.gguf")
    key = struct.pack("<Q", 17) + b"llama.block_count" + struct.pack("<II", 4, 1)
    twice = bytearray(whole.replace(key, key + key, 1))
    struct.pack_into("<Q", twice, 16, struct.unpack_from("<Q", twice, 16)[0] + 1)
    (tmp_path / "bad.gguf").write_bytes(twice)
    assert "duplicate key llama.block_count" in refused(tmp_path / "bad.gguf")
    over = bytearray(whole)
    place = over.index(b"output_norm.weight") + 18 + 4 + 8 + 4
    struct.pack_into("<Q", over, place, 0)
    (tmp_path / "bad.gguf").write_bytes(over)
    assert "overlap" in refused(tmp_path / "bad.gguf")
    struct.pack_into("<Q", over, place, 7)
    (tmp_path / "bad.gguf").write_bytes(over)
    assert "not a multiple of 32" in refused(tmp_path / "bad.gguf")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> bytes:
    """A small whole file with a tokenizer."""
    config = validate(ModelConfig, TINY | {"vocab_size": 300})
    path = tmp_path_factory.mktemp("sound") / "model.gguf"
    export_gguf(path, config, lively(config), tokenizer("sentencepiece"), chat_template="{{ messages }}")
    return path.read_bytes()


def test_a_file_cut_off_anywhere_is_refused(tmp_path, sound):
    path = tmp_path / "cut.gguf"
    start = sound.index(b"blk.0.ffn_down.weight") + 200  # somewhere after the header
    cuts = {*range(0, 600), *range(600, start, 97), *range(start, len(sound), 1999), len(sound) - 33}
    for cut in sorted(cuts):
        path.write_bytes(sound[:cut])
        refused(path)


@given(place=st.integers(0, 40_000), value=st.binary(min_size=1, max_size=8))
def test_no_damage_to_a_header_ends_in_another_error_than_a_refusal(tmp_path_factory, sound, place, value):
    end = sound.index(b"token_embd.weight") + 1000
    place %= end
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(sound[:place] + value + sound[place + len(value) :])
    with suppress(RequestError):  # or it is read: a weight or a token's text may be anything
        found = open_gguf(path)
        found.read(found.config, int)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre": "invented"}, "'tokenizer.ggml.pre' is 'invented'"),
        ({"merges": ["a"]}, "'a', which is not two tokens"),
        ({"merges": ["a c"]}, "'tokenizer.ggml.merges' do not fit"),
        ({"merges": [1]}, "'tokenizer.ggml.merges' is not a list of texts"),
        ({"merges": None}, "'tokenizer.ggml.merges' is missing"),
        ({"token_type": [1]}, "'tokenizer.ggml.token_type' has 1 entries for 8"),
        ({"token_type": [7] * 8}, "an entry 7"),
        ({"tokens": ["a"] * 8}, "'a' twice"),
        ({"tokens": "ab"}, "'tokenizer.ggml.tokens' is not a list"),
        ({"add_bos_token": True, "bos_token_id": 8}, "'tokenizer.ggml.bos_token_id' is 8"),
        ({"add_bos_token": 1}, "'tokenizer.ggml.add_bos_token' is 1"),
        ({"invented": 1}, "'tokenizer.ggml.invented'"),
        ({"model": "llama"}, "'tokenizer.ggml.scores' is missing"),
        ({"model": "llama", "scores": [0.0] * 8, "tokens": [*"abcdefg", "h" * 300]}, "one has 300 characters"),
        ({"model": "llama", "scores": [float("nan")] * 8}, "'tokenizer.ggml.scores'"),
        ({"model": "llama", "scores": [0.0] * 8, "precompiled_charsmap": [1]}, "precompiled_charsmap"),
        ({"tokens": [*"abcdefghi"], "token_type": [1] * 9, "merges": ["a b"]}, "9 tokens|do not fit"),
    ],
)
def test_a_damaged_tokenizer_is_refused_by_its_key(tmp_path, changes, reason):
    with pytest.raises(RequestError, match=reason):
        open_gguf(write(tmp_path / "model.gguf", tokens_of(**changes)))
