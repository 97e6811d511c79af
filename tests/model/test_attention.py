"""The fast forms of attention against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.errors import RequestError
from polygpt.model.attention.blocked import BLOCK, attend_blocked
from polygpt.model.attention.core import attend, attend_plain, choose


def _draw(b, t, n, k, h, dtype=jnp.float32):
    shapes = [(b, t, n, h), (b, t, k, h), (b, t, k, h), (b, t, n, h)]
    random = np.random.default_rng(t + n)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("b", "t", "n", "k", "h"),
    [
        (2, BLOCK, 2, 2, 8),
        (3, BLOCK + 1, 4, 2, 6),
        (1, 2 * BLOCK, 3, 1, 4),
        (4, 3 * BLOCK - 5, 4, 4, 16),
        (2, 3, 2, 1, 4),
    ],
)
def test_blocks_equal_the_equation_in_value_and_gradient(b, t, n, k, h):
    q, key, v, weights = _draw(b, t, n, k, h)
    mask = jnp.tril(jnp.ones((t, t), bool))[None]

    def value_and_gradients(function):
        return jax.jit(jax.value_and_grad(lambda q, k, v: (function(q, k, v) * weights).sum(), argnums=(0, 1, 2)))(
            q, key, v
        )

    found = jax.tree.leaves(value_and_gradients(attend_blocked))
    expected = jax.tree.leaves(value_and_gradients(lambda q, k, v: attend_plain(q, k, v, mask)))
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= 2e-5 * np.abs(b).max() + 1e-5


def test_blocks_hold_large_scores():
    q, k, v, _ = _draw(1, 2 * BLOCK, 1, 1, 4)
    out = attend_blocked(100 * q, 100 * k, v)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, attend(100 * q, 100 * k, v, implementation="xla"), rtol=1e-4, atol=1e-4)


def test_segments_see_only_themselves():
    q, k, v, _ = _draw(1, 12, 2, 2, 4)
    segments = jnp.asarray([[0] * 5 + [1] * 7])
    out = attend(q, k, v, segment_ids=segments)
    np.testing.assert_allclose(out[:, 5:], attend(q[:, 5:], k[:, 5:], v[:, 5:]), rtol=1e-5, atol=1e-6)


def test_dropped_probabilities_are_a_share_of_all():
    q, k, _, _ = _draw(1, 64, 1, 1, 4)
    ones = jnp.ones((1, 64, 1, 4))
    out = attend(q, k, ones, dropout_rate=0.5, key=jax.random.key(0))
    assert float(out.std()) > 0.01  # without dropout a mean of ones is 1
    assert float(out.mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU is here")
def test_cudnn_by_name_is_refused_where_it_cannot_run():
    with pytest.raises(RequestError, match="GPU"):
        choose("cudnn", jnp.bfloat16, 128)


def test_auto_takes_blocks_for_long_sequences_on_a_cpu():
    if jax.default_backend() == "cpu":
        assert choose("auto", jnp.float32, BLOCK + 1) == "blocked"
        assert choose("auto", jnp.float32, BLOCK + 1, simple=False) == "xla"
    assert choose("xla", jnp.float32, BLOCK + 1) == "xla"


@pytest.mark.gpu
def test_cudnn_is_causal_fused_and_close_to_the_equation():
    q, k, v, weights = _draw(2, 256, 4, 2, 64, jnp.bfloat16)
    fused = jax.jit(lambda q, k, v: attend(q, k, v, implementation="cudnn"))
    assert "cudnn" in fused.lower(q, k, v).compile().as_text().lower()
    np.testing.assert_allclose(
        fused(q, k, v).astype(jnp.float32), attend(q, k, v, implementation="xla").astype(jnp.float32), atol=0.03
    )
    later = jax.grad(lambda k: (fused(q, k, v)[:, :100].astype(jnp.float32) * weights[:, :100]).sum())(k)
    assert (later[:, 100:] == 0).all()
