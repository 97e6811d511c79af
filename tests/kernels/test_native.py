"""Products and attention in C++ are those of float64, row by row the same bits, and can be done without."""

import ctypes
import platform
import subprocess
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st

from polygpt.kernels import KVCache, ScoreInputs, ScoreRule, native, pack
from polygpt.kernels.int4 import PackedInt4

TYPES = ["float32", "bfloat16", "int8", "int4"]
SEVERAL = {**{dtype: [dtype] * 4 for dtype in TYPES}, "mixed": TYPES}


def matrices(inputs, outputs, dtype, seed=0):
    """The second of three layers' matrices, packed, and its numbers in float64."""
    weights = np.random.default_rng(seed).normal(size=(3, inputs, outputs)).astype(np.float32)
    packed = pack(weights, (inputs,), (outputs,), dtype)
    return replace(packed, layer=jnp.int32(1)), np.asarray(packed[...], np.float64)[1]


def multiply(packed, x):
    x = jnp.asarray(x)
    if isinstance(packed, PackedInt4):
        arrays = (packed.nibbles, packed.step, packed.zero, packed.unit)
        return native.products_int4(x, [arrays], [packed.outputs[0]], packed.layer)[0]
    return native.products(x, [(packed.values, packed.scale)], packed.layer)[0]


@needs_compiler
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 1100), st.integers(1, 70), st.sampled_from(TYPES), st.integers(0, 99))
def test_products(rows, inputs, outputs, dtype, seed):
    packed, weights = matrices(inputs, outputs, dtype, seed)
    x = np.random.default_rng(seed).normal(size=(rows, inputs)).astype(np.float32)
    size = np.abs(x) @ np.abs(weights)
    assert (np.abs(multiply(packed, x) - x @ weights) <= 1e-6 * size + 1e-6).all()


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("inputs", [41, 48, 600])
def test_a_row_has_the_same_bits_among_any_number_of_others(inputs, dtype):
    packed, _ = matrices(inputs, 100, dtype)
    x = np.random.default_rng(1).normal(size=(23, inputs)).astype(np.float32)
    whole = np.asarray(multiply(packed, x))
    for rows in (1, 2, 3, 5, 8, 16):
        np.testing.assert_array_equal(multiply(packed, x[:rows]), whole[:rows])
        np.testing.assert_array_equal(multiply(packed, x[-rows:]), whole[-rows:])


@needs_compiler
@pytest.mark.parametrize("dtypes", SEVERAL.values(), ids=SEVERAL)
def test_several_matrices_are_multiplied_as_each_alone(dtypes):
    sizes = (100, 3, 17, 200)
    several = [matrices(40, size, dtype)[0] for size, dtype in zip(sizes, dtypes, strict=True)]
    x = np.random.default_rng(1).normal(size=(11, 40)).astype(np.float32)
    x[[0, 5]] = 0
    first, *others = several
    for found, packed in zip(first.times_each(jnp.asarray(x), others), several, strict=True):
        np.testing.assert_array_equal(found, multiply(packed, x))


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES)
def test_rows_of_zeros_are_left_out(dtype):
    packed, _ = matrices(40, 100, dtype)
    x = np.random.default_rng(1).normal(size=(11, 40)).astype(np.float32)
    zeros = [0, 3, 4, 10]
    expected = np.asarray(multiply(packed, x)).copy()
    x[zeros] = expected[zeros] = 0
    np.testing.assert_array_equal(multiply(packed, x), expected)
    assert not np.asarray(multiply(packed, 0 * x)).any()


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_not_finite_stays_in_its_row(dtype):
    packed, _ = matrices(40, 20, dtype)
    x = np.ones((9, 40), np.float32)
    x[2, 39], x[4, 0] = np.nan, np.inf
    y = np.asarray(multiply(packed, x))
    assert np.isnan(y[2]).all()
    assert not np.isfinite(y[4]).any()
    assert np.isfinite(y[[0, 1, 3, 5, 6, 7, 8]]).all()


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES)
def test_a_layer_beyond_the_stack_is_moved_into_it(dtype):
    packed, _ = matrices(40, 33, dtype)
    x = np.random.default_rng(1).normal(size=(3, 40)).astype(np.float32)
    for layer, inside in ((-9, 0), (-1, 2), (3, 2), (2**31 - 1, 2)):
        results = (multiply(replace(packed, layer=jnp.int32(each)), x) for each in (layer, inside))
        np.testing.assert_array_equal(*results)


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES)
def test_sizes_that_do_not_go_together_are_refused(dtype):
    packed, _ = matrices(40, 20, dtype)
    if int4 := isinstance(packed, PackedInt4):
        weights = packed.nibbles, packed.step, packed.zero, packed.unit
    else:
        weights = packed.values, jnp.zeros(0) if packed.scale is None else packed.scale
    for inputs, outputs in ((41, 20), (40, 37)):
        x = jnp.ones((3, inputs), jnp.float32)
        with pytest.raises(Exception, match="sizes that do not go together"):
            native._multiply("polygpt_product" + "_int4" * int4, x, [outputs], [weights], packed.layer)


@needs_compiler
def test_a_cache_of_other_sizes_is_refused():
    keys, last = jnp.ones((2, 1, 6, 8), jnp.float32), jnp.asarray([[5]] * 2, jnp.int32)
    q, rule = jnp.ones((2, 1, 4, 8), jnp.float32), ScoreRule(1.0)
    for other in (keys[:1], keys[..., :7], keys[:, :, :5]):
        with pytest.raises(Exception, match="sizes that do not go together"):
            native.cached_attention(q, KVCache(keys, other, "float32"), rule, ScoreInputs(), last, last, last.max())


@needs_compiler
def test_a_window_may_be_wider_than_32_bits():
    keys = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 6, 8)), jnp.float32)
    q, last = jnp.ones((1, 1, 1, 8), jnp.float32), jnp.asarray([[5]], jnp.int32)
    results = [
        native.cached_attention(
            q, KVCache(keys, keys, "float32"), ScoreRule(1.0, window), ScoreInputs(), last, last, last.max()
        )
        for window in (None, 2**31, 2**32)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


OLDER = {"AVX2": ("-mno-avx512f",), "SSE": ("-mno-avx512f", "-mno-avx2", "-mno-avx", "-mno-fma")}


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86")
@pytest.mark.parametrize("vectors", ["AVX2", pytest.param("SSE", marks=pytest.mark.slow)])
def test_a_row_has_the_same_bits_on_older_processors(vectors, tmp_path, monkeypatch):
    """The compiler takes other liberties with shorter vectors: what is left of a row after them, above all."""
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, *OLDER[vectors]))
    library = ctypes.CDLL(str(native._compile(native._compiler(), tmp_path / "native")))
    for target in native.TARGETS:
        function = jax.ffi.pycapsule(getattr(library, target))
        jax.ffi.register_ffi_target(f"{target}_{vectors}", function, platform="cpu")
    call = jax.ffi.ffi_call
    monkeypatch.setattr(jax.ffi, "ffi_call", lambda target, *a, **b: call(f"{target}_{vectors}", *a, **b))
    random = np.random.default_rng(1)
    for dtype in TYPES:
        for inputs in (21, 41):
            packed, weights = matrices(inputs, 43, dtype)
            x = random.normal(size=(11, inputs)).astype(np.float32)
            whole = np.asarray(multiply(packed, x))
            np.testing.assert_allclose(whole, x @ weights, rtol=1e-3, atol=1e-3)
            for rows in (1, 2, 3, 4):
                np.testing.assert_array_equal(multiply(packed, x[:rows]), whole[:rows])
    keys, values = (jnp.asarray(random.normal(size=(1, 1, 150, 21)), jnp.float32) for _ in range(2))
    cache, last = KVCache(keys, values, "float32"), jnp.asarray([[149]], jnp.int32)
    q, positions = jnp.asarray(random.normal(size=(1, 7, 3, 21)), jnp.float32), 143 + jnp.arange(7)[None]

    def attend(few):
        at = positions[:, few]
        return native.cached_attention(q[:, few], cache, ScoreRule(0.3), ScoreInputs(), at, last, at.max())

    whole = np.asarray(attend(slice(0, 7)))
    for token in range(7):
        np.testing.assert_array_equal(attend(slice(token, token + 1))[0, 0], whole[0, token])


NO_MEMORY = """
#include <cstdint>
#include <new>
namespace xla::ffi {
struct ThreadPool {
  int64_t num_threads() const { return 4; }
  template <class F> void Schedule(F&&) { throw std::bad_alloc(); }
};
}
"""
ALL_PARTS = """
#include "threads.h"
int main() {
  xla::ffi::ThreadPool pool;
  int64_t sum = 0;
  polygpt::in_parallel(pool, 100, [&](int64_t part) { sum += part; });
  return sum == 4950 ? 0 : 1;
}
"""


@needs_compiler
def test_without_memory_to_ask_for_threads_the_work_is_done(tmp_path):
    header, source = tmp_path / "xla/ffi/api/ffi.h", tmp_path / "parts.cc"
    header.parent.mkdir(parents=True)
    header.write_text(NO_MEMORY)
    source.write_text(ALL_PARTS)
    program = str(tmp_path / "parts")
    flags = ("-O1", "-std=c++17", f"-I{tmp_path}", f"-I{native.FOLDER}")
    subprocess.run([*native._compiler(), *flags, str(source), "-o", program], check=True)
    assert subprocess.run([program], stderr=subprocess.DEVNULL).returncode == 0


@needs_compiler
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_score_that_is_not_finite_is_seen_in_the_result(number):
    keys = jnp.ones((1, 1, 6, 8), jnp.float32)
    cache = KVCache(keys.at[0, 0, 2, 3].set(number), keys, "float32")
    last = jnp.asarray([[5]], jnp.int32)
    q = jnp.ones((1, 1, 1, 8), jnp.float32)
    found = native.cached_attention(q, cache, ScoreRule(1.0), ScoreInputs(), last, last, last.max())
    assert np.isnan(found).all()


@needs_compiler
def test_any_reach_and_64_bits():
    keys = jnp.ones((1, 1, 6, 8), jnp.float32)
    q, last = jnp.ones((1, 1, 1, 8), jnp.float32), jnp.asarray([[5]], jnp.int32)
    cache = KVCache(keys, keys, "float32")
    for wide in (False, True):
        with jax.enable_x64(wide):
            reach = jnp.int32(2**31 - 1)
            found = native.cached_attention(q, cache, ScoreRule(1.0), ScoreInputs(), last, last, reach)
            np.testing.assert_allclose(found, q, rtol=1e-6)


@needs_compiler
def test_many_products_at_once_on_all_threads():
    """Products that XLA runs beside each other share its threads, and each is waited for."""
    packed, weights = matrices(200, 300, "int8")
    x = np.random.default_rng(2).normal(size=(40, 4, 200)).astype(np.float32)
    found = jax.jit(lambda x: [multiply(packed, row) for row in x])(x)
    np.testing.assert_allclose(found, x @ weights, rtol=1e-3, atol=1e-3)
