"""Functions of 16-bit numbers that are computed in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.kernels import in_float32
from polygpt.model.norms import layer_normalize, rms_normalize, scale_normalize

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(1.0, 2.0, (3, 5, 16))
GAIN, BIAS = RANDOM.normal(1.0, 0.1, (2, 16))
NORMS = {
    "layernorm": (layer_normalize, (GAIN, BIAS)),
    "layernorm without bias": (layer_normalize, (GAIN, None)),
    "rmsnorm": (rms_normalize, (GAIN,)),
    "scalenorm": (scale_normalize, (GAIN[0],)),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_keeps_16_bits_for_the_gradient_and_rounds_once(name, dtype):
    norm, others = NORMS[name]
    x = jnp.asarray(X).astype(dtype)
    others = [None if each is None else jnp.asarray(each, jnp.float32) for each in others]
    found, back = jax.vjp(lambda x: norm(x, *others, eps=1e-5), x)
    exact, exact_back = jax.vjp(lambda x: norm(x, *others, eps=1e-5), x.astype(jnp.float32))
    np.testing.assert_array_equal(found, exact.astype(dtype))
    np.testing.assert_array_equal(back(jnp.ones_like(x))[0], exact_back(jnp.ones(x.shape))[0].astype(dtype))
    kept = [leaf for leaf in jax.tree.leaves(back) if leaf.ndim == x.ndim]
    assert sum(leaf.nbytes for leaf in kept) <= x.nbytes


def test_wider_numbers_stay_as_wide():
    square = in_float32(lambda x: (seen.append(x.dtype), x * x)[1])
    for dtype, inside in (("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")):
        seen = []
        with jax.enable_x64(True):
            assert square(jnp.ones(3, dtype)).dtype == dtype
        assert [str(each) for each in seen] == [inside]
