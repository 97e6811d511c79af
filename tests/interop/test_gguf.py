"""GGUF both ways: every model and tokenizer comes back as it was, and damage of every kind is refused by name."""

import struct
from contextlib import suppress
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from gguf import GGMLQuantizationType as Kind
from gguf_zoo import GPT2, LLAMA, MODELS, TEXT, lively, model, tokenizer
from hypothesis import given
from hypothesis import strategies as st

from polygpt.config import merge, validate
from polygpt.errors import RequestError
from polygpt.interop import export_gguf, is_gguf, open_gguf
from polygpt.interop.gguf import choose_architecture
from polygpt.interop.gguf.container import GGUFFile
from polygpt.interop.same import computation, differences
from polygpt.model import ModelConfig

TOKENIZERS = ["char", "byte", "bpe", "sentencepiece", "smollm", "llama-bpe", "qwen2", "default"]
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


# Both ways


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_bit_for_bit(tmp_path, name):
    config = model(name)
    params = lively(config)
    export_gguf(tmp_path / "model.gguf", config, params)
    assert is_gguf(tmp_path / "model.gguf")
    found = open_gguf(tmp_path / "model.gguf")
    assert found.tokenizer is None
    if "no biases" not in name:
        assert not differences(computation(config), computation(found.config))
    wanted = found.config if not config.vocab_padding else config
    back = flatten_dict(found.read(wanted, int))
    for path, own in flatten_dict(params).items():
        np.testing.assert_array_equal(back.pop(path), own)
    assert not any(np.asarray(rest).any() for rest in back.values())  # the biases that were not there


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_smaller_types_are_those_of_the_gguf_package(tmp_path, dtype):
    config = model("llama, experts")
    params = lively(config)
    export_gguf(tmp_path / "whole.gguf", config, params)
    export_gguf(tmp_path / "small.gguf", config, params, dtype=dtype)
    kind = Kind[dtype.upper()]
    whole, small = GGUFFile(tmp_path / "whole.gguf"), GGUFFile(tmp_path / "small.gguf")
    for name, info in whole.tensors.items():
        own = Kind.F32 if len(info.shape) == 1 or "gate_inp" in name else kind
        assert small.tensors[name] == (info.shape, own.name)
        again = gguf.dequantize(gguf.quantize(whole.read(name), own), own)
        np.testing.assert_array_equal(small.read(name), again.reshape(info.shape))
    found = open_gguf(tmp_path / "small.gguf")
    assert {leaf.dtype for leaf in jax.tree.leaves(found.read(found.config, int))} == {jnp.dtype(np.float32)}


def test_rows_that_no_block_fits_stay_in_16_bits(tmp_path):
    config = validate(ModelConfig, merge(LLAMA, {"feedforward": {"mlp_dim": 40}}))
    export_gguf(tmp_path / "model.gguf", config, lively(config), dtype="q8_0")
    tensors = GGUFFile(tmp_path / "model.gguf").tensors
    assert tensors["blk.0.ffn_down.weight"].dtype == "F16"
    assert tensors["blk.0.ffn_up.weight"].dtype == "Q8_0"


def test_the_gguf_package_reads_what_is_written(tmp_path):
    config = model("llama")
    export_gguf(tmp_path / "model.gguf", config, lively(config), tokenizer("bpe"), facts={"val_loss": 1.5, "steps": 7})
    theirs, ours = gguf.GGUFReader(tmp_path / "model.gguf"), GGUFFile(tmp_path / "model.gguf")
    assert {t.name: tuple(t.shape.tolist()[::-1]) for t in theirs.tensors} == {
        n: i.shape for n, i in ours.tensors.items()
    }
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert fields.keys() == ours.metadata.keys()
    assert all(fields[key] == pytest.approx(ours.metadata[key]) for key in fields if "tokenizer" not in key)
    assert ours.metadata["polygpt.val_loss"] == 1.5


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_comes_back_as_it_was(tmp_path, kind):
    config, tokens = model("llama"), tokenizer(kind)
    export_gguf(tmp_path / "model.gguf", config, lively(config), tokens, stop_tokens=(3, 4), chat_template="{{ x }}")
    found = open_gguf(tmp_path / "model.gguf")
    assert found.tokenizer.fingerprint == tokens.fingerprint
    assert (found.tokenizer.kind, found.tokenizer.start) == (tokens.kind, tokens.start)
    assert (found.stop_tokens, found.chat_template) == ((3, 4), "{{ x }}")
    assert found.tokenizer.encode(TEXT) == tokens.encode(TEXT)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"position": {"kind": "alibi"}}, "position.kind=alibi"),
        ({"norm": {"kind": "scalenorm"}}, "norm.kind=scalenorm"),
        ({"norm": {"unit_offset": True}}, "norm.unit_offset=True"),
        ({"attention": {"qk_norm": True}}, "attention.qk_norm=True"),
        ({"attention": {"window": 8}}, "attention.window=8"),
        ({"attention": {"softcap": 30.0}}, "attention.softcap=30.0"),
        ({"feedforward": {"activation": "gelu"}}, "feedforward.activation=gelu"),
        ({"position": {"fraction": 0.5}}, "position.fraction=0.5"),
        ({"position": {"scaling": {"kind": "ntk", "factor": 2.0}}}, "position.scaling"),
        ({"logit_softcap": 30.0}, "logit_softcap=30.0"),
        ({"embed_scale": "sqrt"}, "embed_scale=8.0"),
        ({"block": {"kind": "parallel"}}, "block.kind=parallel"),
        ({"num_layers": 0}, "none is near"),
        ({"context_length": 2**32}, "none is near"),
    ],
)
def test_a_model_that_llama_cpp_does_not_compute_is_refused_by_its_part(tmp_path, changes, reason):
    config = validate(ModelConfig, merge(LLAMA, changes))
    with pytest.raises(RequestError) as error:
        export_gguf(tmp_path / "model.gguf", config, {})
    assert reason in str(error.value)
    assert not [*tmp_path.iterdir()]


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    config = model("llama")
    params = lively(config)
    with pytest.raises(RequestError, match="did you mean 'q8_0'"):
        export_gguf(tmp_path / "model.gguf", config, params, dtype="q8")
    large = params | {"embedding": params["embedding"].at[0, 0].set(1e6)}
    with pytest.raises(RequestError, match=r"token_embd\.weight has values too large for f16"):
        export_gguf(tmp_path / "model.gguf", config, large, dtype="f16")
    with pytest.raises(RequestError, match="290 ids, the model 200"):
        export_gguf(tmp_path / "model.gguf", config.replace(vocab_size=200), params, tokenizer("bpe"))
    assert not [*tmp_path.iterdir()]
    (tmp_path / "model.gguf").write_bytes(b"mine")
    with pytest.raises(RequestError, match="exists already"):
        export_gguf(tmp_path / "model.gguf", config, params)
    assert (tmp_path / "model.gguf").read_bytes() == b"mine"


def test_facts_that_32_bits_cannot_hold_are_kept_as_text(tmp_path):
    facts = {"tokens": 2**40, "loss": 1e300, "source": "half \ud800", "list": [1]}
    export_gguf(tmp_path / "model.gguf", model("llama"), lively(model("llama")), facts=facts)
    found = GGUFFile(tmp_path / "model.gguf").metadata
    kept = {key: value for key, value in found.items() if key.startswith("polygpt.")}
    assert kept == {"polygpt.tokens": str(2**40), "polygpt.loss": "1e+300", "polygpt.source": "half ?"}


def test_gpt2_is_found_with_and_without_biases():
    assert choose_architecture(validate(ModelConfig, GPT2)).name == "gpt2"
    bare = merge(GPT2, {"attention": {"bias": False}, "dropout": 0.1, "embed_dropout": 0.1})
    assert choose_architecture(validate(ModelConfig, bare)).name == "gpt2"


# What others write


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantised_tensors_are_spelled_out(tmp_path, kind):
    kinds = {name: Kind[kind] for name, shape in TENSORS.items() if len(shape) == 2}
    found = open_gguf(write(tmp_path / "model.gguf", kinds=kinds))
    params = found.read(found.config, int)
    up = gguf.dequantize(gguf.quantize(values_of((32, 32)), Kind[kind]), Kind[kind])
    np.testing.assert_array_equal(params["blocks"][0]["feedforward"]["up"][0], up.T)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_quants_are_spelled_out(tmp_path, kind):
    """The package cannot make them, so any bytes will do: the scales are halves that are small."""
    block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    raw = np.random.default_rng(0).integers(0, 60, (2, size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "model.gguf")
    assert file.tensors["x"] == ((2, block), kind)
    np.testing.assert_array_equal(file.read("x"), gguf.dequantize(raw, Kind[kind]))


def test_settings_that_files_leave_out_have_llama_cpps_defaults(tmp_path):
    config = open_gguf(write(tmp_path / "model.gguf", without=["llama.attention.head_count_kv"], tensors=wide())).config
    assert (config.attention.num_kv_heads, config.position.theta, config.head) == (4, 10000.0, "tied")
    assert config.norm.eps == 1e-5


def wide():
    return TENSORS | {"blk.0.attn_k.weight": (32, 32), "blk.0.attn_v.weight": (32, 32)}


def test_a_tied_head_that_is_written_once_more_is_tied(tmp_path):
    both = {"output.weight": TENSORS["token_embd.weight"], **TENSORS}
    assert open_gguf(write(tmp_path / "model.gguf", tensors=both)).config.head == "tied"
    other = write(tmp_path / "other.gguf", tensors=both, kinds={"output.weight": Kind.Q8_0})
    assert open_gguf(other).config.head == "untied"


def test_a_number_for_each_layer_is_one_where_they_agree(tmp_path):
    assert open_gguf(write(tmp_path / "a.gguf", {"llama.attention.head_count": [4]})).config.attention.num_heads == 4
    assert "differs from layer to layer" in refused(write(tmp_path / "b.gguf", {"llama.feed_forward_length": [32, 16]}))


def test_experts_may_have_a_tensor_each(tmp_path):
    experts = {f"blk.0.ffn_{part}.{i}.weight": (32, 32) for part in ("gate", "up", "down") for i in range(2)}
    tensors = {
        name: shape for name, shape in TENSORS.items() if not name.endswith(("gate.weight", "up.weight", "down.weight"))
    }
    tensors |= experts | {"blk.0.ffn_gate_inp.weight": (2, 32)}
    counts = {"llama.expert_count": 2, "llama.expert_used_count": 1}
    found = open_gguf(write(tmp_path / "model.gguf", counts, tensors))
    assert (found.config.feedforward.kind, found.config.feedforward.num_experts) == ("moe", 2)
    assert found.read(found.config, int)["blocks"][0]["feedforward"]["up"].shape == (1, 2, 32, 32)


# Damage


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
        ({"llama.block_count": 2**32 - 1}, "'llama.block_count' is larger than 2,147,483,647"),
        ({"llama.block_count": 2**31 - 1}, "2,147,483,647 layers, with 11 tensors"),
        ({"llama.expert_count": 2**31 - 1, "llama.expert_used_count": 1}, "2,147,483,647 experts"),
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
        (header(9, struct.pack("<IQ", 8, 2**22)), "cut off"),
        (header(9, struct.pack("<IQ", 12, 2**22)), "cut off"),
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
        (b"blk.0.ffn_gate.weight", b"blk.0.ffn_down.weight", "blk.0.ffn_down.weight stands there twice"),
        (b"blk.0.attn_k.weight", b"blk.0.attn_v.weight", "blk.0.attn_v.weight stands there twice"),
    ):
        (tmp_path / "bad.gguf").write_bytes(whole.replace(old, new[: len(old)], 1))
        assert reason in refused(tmp_path / "bad.gguf")
    key = struct.pack("<Q", 17) + b"llama.block_count" + struct.pack("<II", 4, 1)
    twice = bytearray(whole.replace(key, key + key, 1))
    struct.pack_into("<Q", twice, 16, struct.unpack_from("<Q", twice, 16)[0] + 1)
    (tmp_path / "bad.gguf").write_bytes(twice)
    assert "the key llama.block_count stands there twice" in refused(tmp_path / "bad.gguf")
    over = bytearray(whole)
    place = over.index(b"output_norm.weight") + 18 + 4 + 8 + 4
    struct.pack_into("<Q", over, place, 0)
    (tmp_path / "bad.gguf").write_bytes(over)
    assert "lie over each other" in refused(tmp_path / "bad.gguf")
    struct.pack_into("<Q", over, place, 7)
    (tmp_path / "bad.gguf").write_bytes(over)
    assert "no multiple of 32" in refused(tmp_path / "bad.gguf")


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


# Tokenizers


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


def test_special_tokens_start_and_end_are_read(tmp_path):
    changes = {"add_bos_token": True, "bos_token_id": 0, "eot_token_id": 7, "token_type": [3, 1, 1, 1, 1, 1, 1, 4]}
    found = open_gguf(write(tmp_path / "model.gguf", tokens_of(**changes)))
    assert (found.tokenizer.start, found.tokenizer.end_of_text, found.stop_tokens) == ((0,), 0, (0, 7))
    assert found.tokenizer.encode("abba") == [3, 7]  # `ba` stands for itself wherever it is
    assert found.tokenizer.encode("<|endoftext|>") != [0]
    assert found.tokenizer.encode("<|endoftext|>", special=True) == [0]


def test_a_start_token_is_llama_3s_default_and_nobody_elses(tmp_path):
    for pre, start in (("llama-bpe", (0,)), ("gpt-2", ())):
        found = open_gguf(write(tmp_path / f"{pre}.gguf", tokens_of(pre=pre, bos_token_id=0)))
        assert found.tokenizer.start == start
