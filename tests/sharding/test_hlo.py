"""The text of XLA programs: products and how often they run."""

import jax
import jax.numpy as jnp

from polygpt.sharding import products


def program(function, *arguments):
    return jax.jit(function).lower(*arguments).as_text(dialect="hlo")


def total(text):
    return sum(product.flops for product in products(text))


def test_products_count_two_flops_a_multiplication_batch_axes_included():
    a, b = jnp.ones((3, 4, 5), jnp.bfloat16), jnp.ones((3, 5, 7), jnp.bfloat16)
    (found,) = products(program(jnp.matmul, a, b))
    assert (found.dtype, found.flops) == ("bfloat16", 2 * 3 * 4 * 5 * 7)


def test_products_in_loops_count_as_often_as_they_run():
    w = jnp.ones((6, 6))

    def body(x, _):
        return x @ w, None

    def nested(x):
        return jax.lax.scan(lambda x, _: (jax.lax.scan(body, x, length=3)[0], None), x, length=5)[0]

    assert total(program(nested, jnp.ones((2, 6)))) == 15 * 2 * 2 * 6 * 6
