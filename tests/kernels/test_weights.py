"""Products with plain weights: their gradients, and the form in which a CPU takes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.kernels import matmuls
from polygpt.kernels.weights import weight_gradient


@pytest.mark.parametrize(("inputs", "shape"), [(1, (6, 9)), (1, (6, 3)), (2, (2, 3, 4)), (1, (6, 2, 5))])
def test_gradients_of_a_product_equal_those_of_the_plain_contraction(inputs, shape):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((2, 5, *shape[:inputs])), jnp.float32)
    weight = jnp.asarray(random.standard_normal(shape), jnp.float32)

    def ours(x, weight):
        return (matmuls(x, [weight], inputs)[0] ** 2).sum()

    def plain(x, weight):
        return (jnp.tensordot(x, weight, inputs) ** 2).sum()

    for found, expected in zip(jax.grad(ours, (0, 1))(x, weight), jax.grad(plain, (0, 1))(x, weight), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the form for a CPU")
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 128), (128, 32)])
def test_a_gradient_of_weights_is_a_product_with_nothing_transposed(inputs, outputs):
    x, d_y = jnp.ones((512, inputs)), jnp.ones((512, outputs))
    text = jax.jit(weight_gradient).lower(x, d_y).compile().as_text()
    assert " dot(" in text
    assert "lhs_contracting_dims={0}" not in text


def test_a_gradient_of_weights_keeps_its_dtype():
    x, d_y = jnp.ones((8, 4), jnp.bfloat16), jnp.ones((8, 2), jnp.bfloat16)
    assert weight_gradient(x, d_y).dtype == jnp.bfloat16
    assert weight_gradient(x, d_y, jnp.float32).dtype == jnp.float32
