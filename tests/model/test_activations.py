"""Activations in 16 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.model.feedforward import ACTIVATIONS


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_16_bits_are_rounded_once_and_no_more_is_kept_for_the_gradient(name, dtype):
    activation = ACTIVATIONS[name]
    x = jnp.linspace(-6, 6, 1001).astype(dtype)
    found, transposed = jax.vjp(activation, x)
    (gradient,) = transposed(jnp.ones_like(x))
    exact, exact_transposed = jax.vjp(activation, x.astype(jnp.float32))
    (exact_gradient,) = exact_transposed(jnp.ones(x.shape))
    np.testing.assert_array_equal(found, exact.astype(dtype))
    np.testing.assert_array_equal(gradient, exact_gradient.astype(dtype))
    kept = [leaf.nbytes for leaf in jax.tree.leaves(transposed) if leaf.shape == x.shape]
    assert sum(kept) <= x.nbytes
