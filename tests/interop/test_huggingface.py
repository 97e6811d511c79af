"""Hugging Face folders against what transformers computed of them (`tests/support/make_references.py`), and back."""

import json
import resource
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from make_references import REFERENCES
from safetensors.numpy import load_file

import polygpt
from polygpt.errors import RequestError
from polygpt.interop import export_huggingface, open_huggingface
from polygpt.loading import adapted
from polygpt.model import Model
from polygpt.tokenizers import TokenizerConfig, load_tokenizer, train_tokenizer

NAMES = sorted(path.name for path in REFERENCES.iterdir())
EVERY_REFERENCE = pytest.mark.parametrize("name", NAMES)


def read(folder, changes=None, dtype=None):
    found = open_huggingface(folder)
    config = adapted(found.config, dtype, changes or {})
    return config, found.read(config, int)


def bits(params):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def logits(config, params, tokens):
    return np.asarray(jax.jit(Model(config).logits)(params, tokens))


@pytest.fixture
def llama(tmp_path):
    """A copy of the reference `llama`, to be changed."""
    shutil.copytree(REFERENCES / "llama", tmp_path / "llama")
    return tmp_path / "llama"


@EVERY_REFERENCE
def test_logits_are_those_of_transformers(name):
    expected = np.load(REFERENCES / name / "expected.npz")
    config, params = read(REFERENCES / name)
    got = logits(config, params, expected["tokens"])
    assert np.abs(got - expected["logits"]).max() < 1e-4 * np.abs(expected["logits"]).max()


@EVERY_REFERENCE
def test_a_round_trip_changes_no_bit(name, tmp_path):
    config, params = read(REFERENCES / name)
    export_huggingface(tmp_path / "out", config, params)
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (REFERENCES / name, tmp_path / "out"))
    assert theirs.keys() == ours.keys()
    assert all(theirs[key].tobytes() == ours[key].tobytes() for key in theirs)
    again, back = read(tmp_path / "out")
    assert again == config
    assert bits(back) == bits(params)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "phi3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_round_trip_in_16_bits_changes_no_bit(name, dtype, tmp_path):
    config, params = read(REFERENCES / name, dtype=dtype)
    export_huggingface(tmp_path / "out", config, params)
    again, back = read(tmp_path / "out")
    assert (again.param_dtype, bits(back)) == (dtype, bits(params))
    wide, _ = read(tmp_path / "out", dtype="float32")
    assert wide.param_dtype == wide.compute_dtype == "float32"


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "phi3"])
def test_weights_packed_while_they_are_read_are_those_packed_afterwards(name, weights):
    found = open_huggingface(REFERENCES / name)
    config = adapted(found.config, None, {"vocab_size": found.config.vocab_size + 3})
    while_read, afterwards = found.read(config, int, weights), Model(config).pack(found.read(config, int), weights)
    assert jax.tree.structure(while_read) == jax.tree.structure(afterwards)
    assert bits(while_read) == bits(afterwards)


def test_files_in_pieces_are_the_same_model(tmp_path):
    config, params = read(REFERENCES / "llama")
    export_huggingface(tmp_path / "out", config, params, shard_bytes=6000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert files == set(index["weight_map"].values())
    assert len(files) > 2
    assert bits(read(tmp_path / "out")[1]) == bits(params)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_a_padded_vocabulary_has_the_same_logits_and_comes_back(name, tmp_path):
    expected = np.load(REFERENCES / name / "expected.npz")
    config, params = read(REFERENCES / name, {"vocab_size": 64})
    assert config.vocab_padding == 14
    got = logits(config, params, expected["tokens"])
    assert np.abs(got[..., :50] - expected["logits"]).max() < 1e-4 * np.abs(expected["logits"]).max()
    assert (np.asarray(jax.nn.softmax(got))[..., 50:] == 0).all()
    export_huggingface(tmp_path / "out", config, params)
    plain = read(REFERENCES / name)
    assert bits(read(tmp_path / "out")[1]) == bits(plain[1])
    assert read(tmp_path / "out")[0] == plain[0]


def test_gpt2s_vocabulary_is_padded_to_a_multiple_of_64_and_back(tmp_path):
    config = polygpt.preset("gpt2", num_layers=1, vocab_size=50257, embed_dim=24, context_length=8)
    params = Model(config).init(0)
    export_huggingface(tmp_path / "a", config, params)
    padded, wide = read(tmp_path / "a", {"vocab_size": 50304})
    assert padded.vocab_padding == 47
    export_huggingface(tmp_path / "b", padded, wide)
    assert (tmp_path / "b/model.safetensors").read_bytes() == (tmp_path / "a/model.safetensors").read_bytes()


def test_a_shorter_context_keeps_the_first_learned_positions():
    config, params = read(REFERENCES / "gpt2", {"context_length": 20})
    expected = np.load(REFERENCES / "gpt2" / "expected.npz")
    got = logits(config, params, expected["tokens"])
    assert np.abs(got - expected["logits"]).max() < 1e-4 * np.abs(expected["logits"]).max()


def test_a_single_file_is_read_before_an_index(tmp_path):
    config, params = read(REFERENCES / "llama")
    export_huggingface(tmp_path / "m", config, params, shard_bytes=6000)
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    export_huggingface(tmp_path / "whole", config, other)
    shutil.copy(tmp_path / "whole/model.safetensors", tmp_path / "m")
    assert bits(read(tmp_path / "m")[1]) == bits(other)
    (tmp_path / "m" / min(index["weight_map"].values())).unlink()  # the index is stale
    assert bits(read(tmp_path / "m")[1]) == bits(other)


def test_roles_of_special_tokens_are_exported(tmp_path):
    config = polygpt.preset("smollm", num_layers=1, vocab_size=260, embed_dim=18, context_length=8)
    specials = ["<s>", "<|end|>", "<pad>"]
    trained = train_tokenizer(TokenizerConfig(kind="byte", special_tokens=specials), ["a"])
    trained.save(tmp_path / "tokenizer.json")
    roles = dict(zip(("bos_token", "eos_token", "pad_token"), specials, strict=True))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", roles)
    ids = {f"{role}_id": tokenizer.special_tokens[token] for role, token in roles.items()}
    export_huggingface(tmp_path / "out", config, Model(config).init(0), tokenizer, stop_tokens=(5,))
    stops = [5, ids["eos_token_id"]]
    for name in ("config.json", "generation_config.json"):
        assert (ids | {"eos_token_id": stops}).items() <= json.loads((tmp_path / "out" / name).read_text()).items()
    assert roles.items() <= json.loads((tmp_path / "out/tokenizer_config.json").read_text()).items()
    found = open_huggingface(tmp_path / "out")
    assert found.tokenizer.roles == roles
    assert found.tokenizer.end_of_text == ids["eos_token_id"]
    assert found.stop_tokens == tuple(stops)


def test_ids_of_the_model_give_roles_that_the_tokenizer_lacks(tmp_path):
    trained = train_tokenizer(TokenizerConfig(kind="char", special_tokens=["<a>", "<b>"]), ["abc"])
    shutil.copytree(REFERENCES / "llama", tmp_path / "m")
    trained.save(tmp_path / "m/tokenizer.json")
    end = trained.special_tokens["<b>"]
    (tmp_path / "m/generation_config.json").write_text(json.dumps({"eos_token_id": [end, 2]}))
    found = open_huggingface(tmp_path / "m")
    assert found.tokenizer.end_of_text == end
    assert found.stop_tokens == (end, 2)


def test_what_comes_along_is_written_and_read(tmp_path):
    tokenizer = train_tokenizer(TokenizerConfig(kind="char"), ["the cat sat on a mat"])
    config, params = read(REFERENCES / "llama")
    export_huggingface(
        tmp_path / "out",
        config,
        params,
        tokenizer,
        stop_tokens=(3,),
        chat_template="{{ messages[0].content }}",
        facts={"steps": 1200, "val_loss": 1.25},
    )
    found = open_huggingface(tmp_path / "out")
    assert found.tokenizer.encode("cat") == tokenizer.encode("cat")
    assert found.chat_template == "{{ messages[0].content }}"
    assert 3 in found.stop_tokens
    card = (tmp_path / "out/README.md").read_text()
    assert "| training steps | 1,200 |" in card
    assert "1.2500" in card
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names


def test_a_head_stored_beside_the_embedding_it_is_tied_to_is_the_same_or_refused(tmp_path):
    from safetensors.numpy import save_file

    shutil.copytree(REFERENCES / "qwen2", tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "m/model.safetensors")
    assert bits(read(tmp_path / "m")[1]) == bits(read(REFERENCES / "qwen2")[1])
    tensors["lm_head.weight"] = tensors["lm_head.weight"].copy()
    tensors["lm_head.weight"][3, 2] += 1
    save_file(tensors, tmp_path / "m/model.safetensors")
    with pytest.raises(RequestError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        open_huggingface(tmp_path / "m")


def test_names_without_the_prefix_are_the_same_model(llama, tmp_path):
    from safetensors.numpy import save_file

    shutil.copytree(REFERENCES / "gpt2", tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    bare = {name.removeprefix("transformer."): values for name, values in tensors.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.float32)  # the causal mask that old files carry
    save_file(bare, tmp_path / "m/model.safetensors")
    assert bits(read(tmp_path / "m")[1]) == bits(read(REFERENCES / "gpt2")[1])


MEASURE = """
import resource, sys
import jax, numpy as np
from pathlib import Path
import polygpt.loading
from polygpt.interop import open_huggingface
found = open_huggingface(Path(sys.argv[1]))
jax.block_until_ready(jax.numpy.zeros(8) + 1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
params = found.read(found.config, int)
jax.block_until_ready(params)
print(peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted in kilobytes on Linux alone")
def test_reading_takes_hardly_more_memory_than_the_weights(tmp_path):
    config = polygpt.preset("smollm", num_layers=8, vocab_size=16000, head="untied", context_length=64)
    config = config.replace(param_dtype="float32", compute_dtype="float32")
    model = Model(config)
    params = jax.tree.map(lambda info: np.ones(info.shape, info.dtype), model.parameters)
    export_huggingface(tmp_path / "big", config, params)
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "big"], capture_output=True, text=True, check=True)
    peak, weights = map(int, done.stdout.split())
    assert weights > 150e6
    assert peak < 1.2 * weights


def test_nothing_is_allocated_for_sizes_that_only_the_configuration_claims(llama):
    path = llama / "config.json"
    values = json.loads(path.read_text())
    values |= {"hidden_size": 1 << 20, "intermediate_size": 1 << 22, "vocab_size": 1 << 30, "head_dim": 1 << 18}
    path.write_text(json.dumps(values))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RequestError, match=r"the tensor model\.embed_tokens\.weight is \[50, 16\]; by the configura"):
        open_huggingface(llama)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18
