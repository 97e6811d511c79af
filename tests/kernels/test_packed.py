"""Packed weights: the same model in the form that inference reads."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xla
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

import polygpt
from polygpt.config import merge, validate
from polygpt.errors import RequestError
from polygpt.generation import Request, Sampler, engine_for, run_all
from polygpt.kernels import WEIGHT_TYPES, layer_view, pack, packed
from polygpt.language_model import LanguageModel
from polygpt.loading import save
from polygpt.model import Model, ModelConfig

# Elsewhere products are taken in another form, which needs none of this.
ON_A_CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="a form for CPUs alone")
KINDS = {
    "plain": {},
    "untied": {"head": "untied", "attention": {"bias": True}},
    "pattern": {"num_layers": 3, "pattern": [{"feedforward": zoo.MOE}, {"attention": {"window": 5}}]},
    "linear": {"attention": zoo.LINEAR, "feedforward": zoo.SOFT},
    "learned": {"position": "learned", "norm": "layernorm", "scan_layers": True, "num_layers": 3},
    "no-head": {"head": "none", "embed_dim": zoo.VOCAB, "attention": {"head_dim": 8}},
}


def tiny(name: str, dtype: str = "float32") -> ModelConfig:
    types = {"param_dtype": dtype, "compute_dtype": dtype}
    return validate(ModelConfig, merge({**zoo.BASE, "num_layers": 2, **types}, KINDS[name]))


def both(config: ModelConfig, dtype: str) -> tuple[LanguageModel, LanguageModel]:
    """The model as it is, and packed."""
    params = zoo.lively(Model(config))
    plain, own = (LanguageModel(config, jax.tree.map(jnp.copy, params)) for _ in range(2))
    own.pack(dtype)
    return plain, own


def logits(lm: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lm.model.logits)(lm.params, tokens))


def tokens(rows: int, length: int = 10) -> np.ndarray:
    return np.random.default_rng(0).integers(0, zoo.VOCAB, (rows, length))


@pytest.mark.parametrize("name", KINDS)
def test_float32_computes_the_same(name):
    plain, own = both(tiny(name), "float32")
    assert own.num_parameters == plain.num_parameters
    # Few rows, some and many are multiplied in other forms.
    for rows, length in ((1, 2), (2, 5), *([(13, 10)] if name == "plain" else [])):
        seen = tokens(rows, length)
        np.testing.assert_allclose(logits(own, seen), logits(plain, seen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "rows"), [("plain", 7), ("pattern", 2), ("learned", 1)])
def test_the_same_text(name, rows):
    def text(lm):
        requests = [Request(prompt, 8, Sampler(temperature=0)) for prompt in tokens(rows).tolist()]
        return [handle.tokens for handle in run_all(engine_for(lm.model, lm.params, requests), requests)]

    plain, own = both(tiny(name), "float32")
    assert text(own) == text(plain)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_16_bits_lose_nothing_that_was_in_16_bits(rows, compute):
    config = tiny("untied", "bfloat16").replace(compute_dtype=compute)
    plain, own = both(config, "bfloat16")
    wide = LanguageModel(
        config.replace(param_dtype="float32", compute_dtype="float32"),
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), plain.params),
    )
    seen = tokens(rows)
    limit = 1e-5 if compute == "float32" else 3e-2
    exact = logits(wide, seen)
    assert np.abs(logits(own, seen) - exact).max() < limit * np.abs(exact).max()


@pytest.mark.parametrize("rows", [1, 3])
def test_8_bits_are_near(rows):
    plain, own = both(tiny("untied"), "int8")
    seen, exact = tokens(rows), logits(plain, tokens(rows))
    error = np.abs(logits(own, seen) - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 5e-2


@pytest.mark.parametrize("rows", [1, 9])
def test_the_head_in_blocks(monkeypatch, rows):
    """The last block begins where the one before it has not ended."""
    monkeypatch.setattr(packed, "BLOCK", 8)
    table = np.random.default_rng(0).standard_normal((37, 16)).astype(jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, 16)), jnp.float32)
    own = pack(table, (), table.shape, "bfloat16")
    assert "scan" in str(jax.make_jaxpr(partial(own.times, in_loop=True))(x))
    found = own.times(x, in_loop=True)
    np.testing.assert_allclose(found, np.asarray(x) @ table.astype(np.float32).T, rtol=1e-5, atol=1e-5)


shapes = st.lists(st.integers(1, 5), min_size=1, max_size=2)


@settings(max_examples=30)  # each shape is compiled
@given(
    stack=st.lists(st.integers(1, 3), max_size=1), inputs=shapes, outputs=shapes, dtype=st.sampled_from(WEIGHT_TYPES)
)
def test_a_packed_matrix_gives_its_numbers_back(stack, inputs, outputs, dtype):
    own = np.random.default_rng(0).standard_normal((*stack, *inputs, *outputs)).astype(np.float32)
    back = np.asarray(pack(own, tuple(inputs), tuple(outputs), dtype)[...].astype(jnp.float32))
    steps = {"float32": 0, "bfloat16": 2**-8, "float16": 2**-11, "int8": 1 / 200}[dtype]
    assert back.shape == own.shape
    # int8: half a step of the output's largest weight.
    largest = np.abs(own).max(tuple(range(len(stack), len(stack) + len(inputs))), keepdims=True)
    assert (np.abs(back - own) <= steps * largest).all()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_layer_has_its_own_matrix_of_the_stack(dtype):
    own = np.random.default_rng(0).standard_normal((3, 16, 8)).astype(np.float32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((300, 16)), jnp.float32)
    layer = layer_view(pack(own, (16,), (8,), dtype), jnp.int32(1))
    np.testing.assert_allclose(layer[...], own[1], atol=0.02)
    for rows in (1, 8, 300):
        np.testing.assert_allclose(layer.times(x[:rows]), x[:rows] @ np.asarray(layer[...]), rtol=1e-4, atol=1e-4)


def test_nan_and_zero_stay_what_they_are():
    table = np.array([[0.0, 0.0], [np.nan, 1.0]], np.float32)
    own = pack(table, (), table.shape, "float32")
    np.testing.assert_array_equal(own[...], table)
    np.testing.assert_array_equal(pack(table[:1], (), (1, 2), "int8")[...], table[:1])


@ON_A_CPU
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_no_weights_are_converted_in_memory_while_decoding_a_row(dtype):
    wide = {"kind": "mlp", "mlp_dim": packed.FUSED + 100}
    config = tiny("plain").replace(num_layers=12, embed_dim=64, vocab_size=5000, feedforward=wide)
    model = Model(config)
    params = model.pack(model.init(0), dtype)
    runner = engine_for(model, params, [Request([1], 8, Sampler(temperature=0))])._runner
    lowered = runner._programs.decode.lower(
        params, runner._state, runner._arrays(), np.array([True]), np.int32(8), np.False_, runner._no_masks
    )
    compiled = lowered.compile(compiler_options=xla.OPTIMIZED)
    one_matrix = 4 * 64 * wide["mlp_dim"]  # bytes in 32 bits, of a layer; the head has a few more
    assert compiled.memory_analysis().temp_size_in_bytes < one_matrix / 4


@ON_A_CPU
def test_no_weights_are_copied_while_decoding_some_rows():
    wide = {"kind": "mlp", "mlp_dim": 4096}
    config = tiny("plain").replace(num_layers=12, embed_dim=64, feedforward=wide)
    model = Model(config)
    params = model.pack(model.init(0), "float32")
    lowered = jax.jit(lambda params, tokens: model.hidden(params, tokens).hidden).lower(params, tokens(8, 1))
    compiled = lowered.compile(compiler_options=xla.OPTIMIZED)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 64 * wide["mlp_dim"]  # bytes of one matrix


def test_packed_weights_are_refused_where_parameters_are_needed(tmp_path):
    lm = polygpt.build(tiny("plain"))
    with pytest.raises(RequestError, match="no weights of type 'int4'"):
        lm.pack("int4")
    lm.pack("int8")
    for what in (lambda: save(lm, tmp_path / "model"), lambda: lm.pack("int8")):
        with pytest.raises(RequestError, match="packed"):
            what()
    assert not list(tmp_path.iterdir())
