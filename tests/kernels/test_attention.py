"""The fast forms of attention against the equation, and who is chosen where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xla

from polygpt.errors import RequestError
from polygpt.kernels import AttentionSpec, ScoreInputs, ScoreRule, attention, blocked, choose_attention
from polygpt.kernels import reference_attention as reference
from polygpt.kernels.blocked import BLOCK, MAX_SPANS, blocked_attention
from polygpt.kernels.pallas import pallas_attention

SINKS, SLOPES = jnp.asarray([0.1, 0.5, -1.0, 2.0]), jnp.asarray([0.4, 0.1, 0.03, 0.2])


def draw(b, t, n, k, h, dtype=jnp.float32):
    shapes = [(b, t, n, h), (b, t, k, h), (b, t, k, h), (b, t, n, h)]
    random = np.random.default_rng(t + n)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def documents(b, t):
    return jnp.asarray(np.sort(np.random.default_rng(t).integers(0, 4, (b, t)), 1), jnp.int32)


def by_equation(q, k, v, rule, inputs):
    positions = jnp.arange(q.shape[1])[None]
    return reference(q, k, v, rule, inputs, positions, positions)


def assert_same(function, q, k, v, weights, rule, inputs, tolerance=2e-5):
    """Values and the gradients of queries, keys, values and sinks."""

    def value_and_gradients(form):
        def objective(q, k, v, sinks):
            return (form(q, k, v, rule, inputs._replace(sinks=sinks)) * weights).sum()

        return jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2, 3)))(q, k, v, inputs.sinks)

    found, expected = value_and_gradients(function), value_and_gradients(by_equation)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max() + 1e-5


@pytest.mark.parametrize(
    ("shape", "rule", "extra"),
    [
        ((2, BLOCK, 2, 2, 8), {}, ()),
        ((3, BLOCK + 1, 4, 2, 6), {}, ()),
        ((1, 2 * BLOCK, 3, 1, 4), {}, ()),
        ((4, 3 * BLOCK - 5, 4, 4, 16), {"softcap": 2.0}, ("sinks", "slopes", "documents")),
        ((2, 3, 2, 1, 4), {}, ()),
        ((1, BLOCK * MAX_SPANS + 100, 2, 1, 4), {}, ()),
        ((2, 3 * BLOCK + 7, 4, 2, 8), {"window": 10}, ("sinks", "documents")),
        ((1, 3 * BLOCK + 7, 4, 2, 8), {"window": BLOCK + 6, "softcap": 1.5}, ("slopes", "sinks")),
        ((1, 5 * BLOCK, 4, 1, 8), {"window": 3 * BLOCK}, ()),
        ((2, 20, 4, 4, 8), {"window": 3}, ("slopes",)),
        ((3, 70, 4, 2, 8), {"window": 2}, ("documents",)),
    ],
)
def test_blocks_equal_the_equation_in_value_and_gradient(shape, rule, extra):
    b, t, n, _, h = shape
    inputs = ScoreInputs(
        sinks=SINKS[:n] if "sinks" in extra else None,
        slopes=SLOPES[:n] if "slopes" in extra else None,
        segment_ids=documents(b, t) if "documents" in extra else None,
    )
    assert_same(blocked_attention, *draw(*shape), ScoreRule(h**-0.5, **rule), inputs)


@pytest.mark.parametrize(
    ("rule", "extra"), [({}, ()), ({"window": 40}, ("documents",)), ({"softcap": 2.0, "window": 130}, ("sinks",))]
)
def test_the_pallas_kernel_interpreted_equals_the_equation(rule, extra):
    q, k, v, weights = draw(1, 200, 4, 2, 32)
    inputs = ScoreInputs(
        sinks=SINKS if "sinks" in extra else None, segment_ids=documents(1, 200) if "documents" in extra else None
    )

    def kernel(q, k, v, rule, inputs):
        return pallas_attention(q, k, v, rule, inputs, interpret=True)

    assert_same(kernel, q, k, v, weights, ScoreRule(32**-0.5, **rule), inputs, tolerance=1e-4)


def test_blocks_hold_large_scores():
    q, k, v, _ = draw(1, 2 * BLOCK, 1, 1, 4)
    rule = ScoreRule(0.5)
    out, expected = (
        jax.jit(form, static_argnums=3)(100 * q, 100 * k, v, rule, ScoreInputs())
        for form in (blocked_attention, by_equation)
    )
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 20])
def test_blocks_take_memory_by_length_not_by_its_square(window):
    def temporary(t):
        q, k, v, weights = (jax.ShapeDtypeStruct((1, t, 2, 8), jnp.float32) for _ in range(4))
        rule = ScoreRule(0.3, window)

        def objective(q, k, v, weights):
            return (blocked_attention(q, k, v, rule, ScoreInputs()) * weights).sum()

        gradient = jax.jit(jax.grad(objective, argnums=(0, 1, 2)))
        compiled = gradient.lower(q, k, v, weights).compile(compiler_options=xla.OPTIMIZED)
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4 * 2048) < 4.2 * temporary(2048)


def test_segments_see_only_themselves():
    q, k, v, _ = draw(1, 12, 2, 2, 4)
    rule = ScoreRule(0.5)
    compiled = jax.jit(attention, static_argnums=3)
    out = compiled(q, k, v, rule, ScoreInputs(segment_ids=jnp.asarray([[0] * 5 + [1] * 7])))
    alone = compiled(q[:, 5:], k[:, 5:], v[:, 5:], rule, ScoreInputs())
    np.testing.assert_allclose(out[:, 5:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("length", "window"), [(BLOCK, None), (3 * BLOCK, None), (3 * BLOCK, 60)])
def test_dropped_probabilities_are_a_share_of_all(length, window):
    q, k, _, _ = draw(2, length, 1, 1, 4)
    ones = jnp.ones((2, length, 1, 4))
    rule, inputs = ScoreRule(0.1, window, dropout=0.5), ScoreInputs(key=jax.random.key(0))
    compiled = jax.jit(attention, static_argnums=3)
    out = compiled(q, k, ones, rule, inputs)
    assert float(out.std()) > 0.01  # without dropout a mean of ones is 1
    assert float(out.mean()) == pytest.approx(1, abs=0.1)
    assert not np.allclose(out[0], out[1]), "rows of the batch drop alike"
    again, other = (compiled(q, k, ones, rule, ScoreInputs(key=jax.random.key(seed))) for seed in (0, 1))
    np.testing.assert_array_equal(out, again)
    assert not np.allclose(out, other)


def test_blocks_drop_differently_from_one_another():
    zeros, ones = jnp.zeros((1, 4 * BLOCK, 1, 4)), jnp.ones((1, 4 * BLOCK, 1, 4))
    rule, inputs = ScoreRule(1.0, window=20, dropout=0.5), ScoreInputs(key=jax.random.key(0))
    out = jax.jit(blocked_attention, static_argnums=3)(zeros, zeros, ones, rule, inputs)
    shares = np.asarray(out[0, :, 0, 0]).reshape(4, BLOCK)[1:]  # what is left of each query's probabilities
    assert not np.allclose(shares[0], shares[1])
    assert not np.allclose(shares[1], shares[2])


def test_the_gradient_drops_what_the_forward_pass_dropped():
    q, k, v, weights = draw(2, 3 * BLOCK, 2, 1, 4)
    rule, inputs = ScoreRule(0.5, window=50, dropout=0.3), ScoreInputs(key=jax.random.key(3))

    def objective(q, v):
        return (blocked_attention(q, k, v, rule, inputs) * weights).sum()

    value = jax.jit(objective)
    along_q, along_v = jax.jit(jax.grad(objective, argnums=(0, 1)))(q, v)
    # The output is linear in the values, so the gradient is exact along any direction.
    assert float((along_v * v).sum()) == pytest.approx(float(value(q, v)), rel=1e-4)
    step = 1e-2 * q / jnp.linalg.norm(q)
    moved = [value(q + sign * step, v) for sign in (1, -1)]
    assert float((along_q * step).sum()) == pytest.approx(float(moved[0] - moved[1]) / 2, rel=0.02)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU does")
def test_who_computes_attention_on_a_cpu():
    short, long = (AttentionSpec(jnp.float32, length, 64) for length in (BLOCK, BLOCK + 1))
    assert choose_attention("auto", short) == "xla"
    assert choose_attention("auto", long) == "xla in blocks"
    assert choose_attention("xla", short._replace(extras=frozenset({"window"}))) == "xla in blocks"
    for name, machine in (("cudnn", "GPU"), ("pallas", "TPU")):
        with pytest.raises(RequestError, match=f"implementation={name} needs .*{machine}"):
            choose_attention(name, AttentionSpec(jnp.bfloat16, 128, 64))


@pytest.mark.gpu
def test_cudnn_is_causal_fused_and_close_to_the_equation():
    q, k, v, weights = draw(2, 256, 4, 2, 64, jnp.bfloat16)
    rule, inputs = ScoreRule(0.125), ScoreInputs()
    fused = jax.jit(lambda q, k, v: attention(q, k, v, rule, inputs, implementation="cudnn"))
    assert "cudnn" in fused.lower(q, k, v).compile().as_text().lower()
    np.testing.assert_allclose(
        fused(q, k, v).astype(jnp.float32),
        attention(q, k, v, rule, inputs, implementation="xla").astype(jnp.float32),
        atol=0.03,
    )
    later = jax.grad(lambda k: (fused(q, k, v)[:, :100].astype(jnp.float32) * weights[:, :100]).sum())(k)
    assert (later[:, 100:] == 0).all()


@pytest.mark.parametrize(("batch", "heads", "parts"), [(10, 1, 5), (12, 3, 6), (1, 4, 4), (7, 7, 7), (1, 1, 1)])
def test_the_work_is_cut_for_as_many_cores_as_batch_or_heads_allow(batch, heads, parts, monkeypatch):
    monkeypatch.setattr(blocked.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(blocked.jax, "default_backend", lambda: "cpu")
    seen = []
    q, k = jnp.zeros((batch, 2, 2 * heads, 4)), jnp.zeros((batch, 2, heads, 4))
    out, _ = blocked._in_parts(lambda inputs, q, k: seen.append(q.shape) or (q, k), ScoreInputs(), q, k)
    assert (len(seen), out.shape) == (parts, q.shape)
