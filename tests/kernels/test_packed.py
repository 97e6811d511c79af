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
from polygpt.kernels import WEIGHT_TYPES, in_stack, int4, layer_view, native, pack, packed
from polygpt.language_model import LanguageModel
from polygpt.loading import save
from polygpt.model import Model, ModelConfig

# Elsewhere products are taken in another form, which needs none of this.
pytestmark = pytest.mark.usefixtures("compute")
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
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_16_bits_lose_nothing_that_was_in_16_bits(rows, compute_dtype):
    config = tiny("untied", "bfloat16").replace(compute_dtype=compute_dtype)
    plain, own = both(config, "bfloat16")
    wide = LanguageModel(
        config.replace(param_dtype="float32", compute_dtype="float32"),
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), plain.params),
    )
    seen = tokens(rows)
    limit = 1e-5 if compute_dtype == "float32" else 3e-2
    exact = logits(wide, seen)
    assert np.abs(logits(own, seen) - exact).max() < limit * np.abs(exact).max()


@pytest.mark.parametrize("rows", [1, 3])
def test_8_bits_are_near(rows):
    plain, own = both(tiny("untied"), "int8")
    seen, exact = tokens(rows), logits(plain, tokens(rows))
    error = np.abs(logits(own, seen) - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 5e-2


@pytest.mark.parametrize(("name", "rows"), [("plain", 1), ("linear", 7)])
def test_4_bits_are_those_of_the_numbers_they_stand_for(name, rows):
    plain, own = both(tiny(name), "int4")
    exact = jax.tree.map(lambda leaf: leaf[...], own.params, is_leaf=in_stack)
    seen = tokens(rows)
    expected = logits(LanguageModel(plain.config, exact), seen)
    assert np.abs(logits(own, seen) - expected).max() < 1e-5 * np.abs(expected).max()
    error = np.abs(expected - logits(plain, seen)).max() / np.abs(expected).max()
    assert 1e-2 < error < 0.5


@pytest.mark.parametrize(
    ("outputs", "rows", "in_loop"), [(37, 1, False), (128, 3, True), (37, 9, True), (128, 200, False)]
)
def test_a_product_in_4_bits(monkeypatch, rows, outputs, in_loop):
    monkeypatch.setattr(int4, "BLOCK", 32)
    monkeypatch.setattr(packed, "BLOCK", 32)
    monkeypatch.setattr(packed, "FUSED", 24)
    random = np.random.default_rng(0)
    table, x = (random.standard_normal(shape).astype(np.float32) for shape in ((outputs, 48), (rows, 48)))
    own = pack(table, (), table.shape, "int4")
    numbers = np.asarray(own[...])
    np.testing.assert_array_equal(own[jnp.arange(outputs)[::-1]], numbers[::-1])
    np.testing.assert_allclose(own.times(jnp.asarray(x), in_loop=in_loop), x @ numbers.T, rtol=1e-5, atol=2e-5)


def test_4_bits_err_by_half_a_step_of_their_group():
    """In the mean of a group, which holds 16 values from its least to its largest weight."""
    random = np.random.default_rng(0)
    own = random.standard_normal((2, 40, 64)) * np.exp(random.standard_normal((40, 1)))  # inputs of all magnitudes
    own *= np.exp(3 * random.standard_normal(64))  # and outputs, which have units of their own
    back = np.asarray(pack(own.astype(np.float32), (40,), (64,), "int4")[...])
    unit = np.sqrt((own**2).mean(1, keepdims=True))
    groups, errors = ((array / unit).reshape(2, 40, 4, 16) for array in (own, back - own))
    step = (np.maximum(groups.max(-1), 0) - np.minimum(groups.min(-1), 0)) / 15
    coarsest = step.max(1, keepdims=True) / 255  # steps are multiples of this
    root_mean_square = np.sqrt((errors**2).mean(-1))
    assert (root_mean_square < (step + coarsest) * (0.5 + 1 / 32)).all()
    assert root_mean_square.mean() < 0.3 * step.mean()  # uniform errors: 0.29


def test_4_bits_take_five_eighths_of_the_memory_of_8():
    own = np.random.default_rng(0).standard_normal((3, 256, 128)).astype(np.float32)
    four, eight = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(pack(own, (256,), (128,), kind))) for kind in ("int4", "int8")
    )
    assert four < 0.64 * eight


@pytest.mark.parametrize("rows", [1, 9])
def test_the_head_in_blocks(monkeypatch, rows):
    """The last block begins where the one before it has not ended."""
    monkeypatch.setattr(native, "available", lambda: False)
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
    steps = {"float32": 0, "bfloat16": 2**-8, "float16": 2**-11, "int8": 1 / 200, "int4": 1 / 2}[dtype]
    assert back.shape == own.shape
    # int8: half a step of the output's largest weight; int4: see its own test.
    axes = range(len(stack), own.ndim if dtype == "int4" else len(stack) + len(inputs))
    largest = np.abs(own).max(tuple(axes), keepdims=True)
    assert (np.abs(back - own) <= steps * largest).all()


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_a_layer_has_its_own_matrix_of_the_stack(dtype):
    own = np.random.default_rng(0).standard_normal((3, 16, 8)).astype(np.float32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((300, 16)), jnp.float32)
    layer = layer_view(pack(own, (16,), (8,), dtype), jnp.int32(1))
    np.testing.assert_allclose(layer[...], own[1], atol=0.3 if dtype == "int4" else 0.02)
    for rows in (1, 8, 300):
        np.testing.assert_allclose(layer.times(x[:rows]), x[:rows] @ np.asarray(layer[...]), rtol=1e-4, atol=1e-4)


def test_nan_and_zero_stay_what_they_are():
    table = np.array([[0.0, 0.0], [np.nan, 1.0]], np.float32)
    own = pack(table, (), table.shape, "float32")
    np.testing.assert_array_equal(own[...], table)
    np.testing.assert_array_equal(pack(table[:1], (), (1, 2), "int8")[...], table[:1])
    some = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32) * (np.arange(16) % 3 > 0)[:, None]
    np.testing.assert_array_equal((pack(some, (), some.shape, "int4")[...] == 0).all(1), np.arange(16) % 3 == 0)
    assert np.isnan(pack(table, (), table.shape, "int4")[...]).any()  # and is seen in the logits


@ON_A_CPU
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
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
@pytest.mark.parametrize("compute", ["C++"], indirect=True)  # XLA copies a layer's matrix out of its stack
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
    with pytest.raises(RequestError, match="no weights of type 'int3'; there are float32"):
        lm.pack("int3")
    with pytest.raises(RequestError, match="no weights of type 'int3'; there are float32"):
        polygpt.load(tmp_path, weights="int3")  # before anything is read
    lm.pack("int8")
    for what in (lambda: save(lm, tmp_path / "model"), lambda: lm.pack("int8")):
        with pytest.raises(RequestError, match="packed"):
            what()
    assert not list(tmp_path.iterdir())
