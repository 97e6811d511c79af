"""GGUF both ways: every model and tokenizer comes back as it was, and what others write is read."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from gguf import GGMLQuantizationType as Kind
from gguf_files import TENSORS, WIDE, refused, tokens_of, values_of, write
from gguf_zoo import GPT2, LLAMA, MODELS, TEXT, lively, model, tokenizer

from polygpt.config import merge, validate
from polygpt.errors import RequestError
from polygpt.interop import export_gguf, is_gguf, open_gguf
from polygpt.interop.gguf import choose_architecture
from polygpt.interop.gguf.container import GGUFFile
from polygpt.interop.same import computation, differences
from polygpt.model import ModelConfig

TOKENIZERS = ["char", "byte", "bpe", "sentencepiece", "smollm", "llama-bpe", "qwen2", "default"]
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
        ({"num_layers": 0}, "num_layers=0 has no counterpart"),
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


def test_a_window_that_spans_the_context_is_none():
    for attention in ({"window": LLAMA["context_length"]}, {"kind": "local", "num_heads": 4, "window": 10**6}):
        whole = validate(ModelConfig, merge(LLAMA, {"attention": attention}))
        assert choose_architecture(whole).name == "llama"


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
    config = open_gguf(write(tmp_path / "model.gguf", without=["llama.attention.head_count_kv"], tensors=WIDE)).config
    assert (config.attention.num_kv_heads, config.position.theta, config.head) == (4, 10000.0, "tied")
    assert config.norm.eps == 1e-5


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


def test_special_tokens_start_and_end_are_read(tmp_path):
    changes = {"add_bos_token": True, "bos_token_id": 0, "eot_token_id": 7, "token_type": [3, 1, 1, 1, 1, 1, 1, 4]}
    found = open_gguf(write(tmp_path / "model.gguf", tokens_of(**changes)))
    assert (found.tokenizer.start, found.tokenizer.end_of_text, found.stop_tokens) == ((0,), 0, (0, 7))
    assert found.tokenizer.encode("abba") == [3, 7]  # `ba` stands for itself wherever it is
    with pytest.raises(RequestError, match="'<'"):  # as text: its letters have no tokens
        found.tokenizer.encode("<|endoftext|>")
    assert found.tokenizer.encode("<|endoftext|>", special=True) == [0]


def test_a_start_token_is_llama_3s_default_and_nobody_elses(tmp_path):
    for pre, start in (("llama-bpe", (0,)), ("gpt-2", ())):
        found = open_gguf(write(tmp_path / f"{pre}.gguf", tokens_of(pre=pre, bos_token_id=0)))
        assert found.tokenizer.start == start
