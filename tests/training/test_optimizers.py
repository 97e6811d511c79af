"""Optimizers and schedules against their equations, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.model import Model, ModelConfig
from polygpt.training.optimizers import AdamWConfig, CosineConfig, MuonConfig, TrapezoidConfig, build_optimizer

FIELDS = {
    "vocab_size": 11,
    "context_length": 8,
    "embed_dim": 8,
    "num_layers": 2,
    "position": "learned",
    "norm": "layernorm",
    "attention": {"kind": "softmax", "num_heads": 2, "bias": True},
    "feedforward": {"kind": "mlp", "mlp_dim": 12},
}


@pytest.fixture(scope="module")
def model():
    return Model(validate(ModelConfig, FIELDS))


def draw(model, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda info: jnp.asarray(random.standard_normal(info.shape), jnp.float32), model.parameters)


def updates(optimizer, params, gradients):
    """The parameters after each gradient."""
    state = jax.jit(optimizer.init)(params)
    step = jax.jit(optimizer.update)
    for gradient in gradients:
        change, state = step(gradient, state, params)
        params = jax.tree.map(jnp.add, params, change)
        yield params


def test_adamw_is_its_equation_and_decays_matrices_only(model):
    params, gradients = draw(model, 0), [draw(model, seed) for seed in (1, 2, 3)]
    config = AdamWConfig(learning_rate=0.1, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.5)
    found = list(updates(build_optimizer(config, model, lambda step: 0.1 / (1 + step)), params, gradients))[-1]
    decayed = {}
    for path, p in jax.tree_util.tree_leaves_with_path(params):

        def at(tree, path=path):
            return np.asarray(dict(jax.tree_util.tree_leaves_with_path(tree))[path], np.float64)

        value, m, v = np.asarray(p, np.float64), 0, 0
        decay = at(jax.tree.map(lambda info: float(info.inputs is not None), model.parameters))
        for t, gradient in enumerate(gradients, 1):
            g = at(gradient)
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            direction = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
            value = value - 0.1 / t * (direction + 0.5 * decay * value)
        np.testing.assert_allclose(at(found), value, rtol=2e-4, atol=2e-5)
        decayed[jax.tree_util.keystr(path, simple=True, separator=".")] = bool(decay)
    assert decayed["blocks.0.attention.query"]
    assert decayed["embedding"]
    assert not decayed["blocks.0.attention.query_bias"]
    assert not decayed["final_norm.gain"]


def test_muon_orthogonalises_each_layers_matrix_by_its_contracted_axes(model):
    params, gradient = draw(model, 0), draw(model, 1)
    config = MuonConfig(learning_rate=1.0, adam_learning_rate=0.1, weight_decay=0.0)
    found = next(updates(build_optimizer(config, model, lambda step: 1.0), params, [gradient]))
    change = jax.tree.map(lambda a, b: np.asarray(a - b), found, params)
    attention = change["blocks"][0]["attention"]
    matrices = {
        "query": attention["query"].reshape(2, 8, 8),  # [layers, D, N·H]
        "out": attention["out"].reshape(2, 8, 8),  # [layers, N·H, D]
        "up": change["blocks"][0]["feedforward"]["up"],
    }
    for name, stack in matrices.items():
        for matrix in stack:
            values = np.linalg.svd(matrix, compute_uv=False)
            wide = max(1.0, matrix.shape[1] / matrix.shape[0]) ** 0.5  # the scaling by sqrt(fan-out/fan-in)
            assert ((0.5 * wide < values) & (values < 1.4 * wide)).all(), f"{name}: {values}"
    # The embedding's first step is that of Adam with Nesterov momentum: ± rate · (b1(1-b1)/(1-b1²) + 1).
    np.testing.assert_allclose(np.abs(change["embedding"]), 0.1 * (0.9 * 0.1 / 0.19 + 1), rtol=1e-3)


def test_cosine_warms_up_and_ends_at_its_fraction():
    schedule = CosineConfig(warmup_steps=10, final_fraction=0.1).build(2.0, 110)
    assert float(schedule(0)) == pytest.approx(0.2)
    assert float(schedule(10)) == pytest.approx(2.0)
    assert float(schedule(60)) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5), rel=1e-5)
    assert float(schedule(110)) == pytest.approx(0.2)
    assert all(float(schedule(s)) > float(schedule(s + 1)) for s in range(10, 109))


def test_trapezoid_is_flat_then_falls_to_nothing():
    schedule = TrapezoidConfig(warmup_steps=10, decay_fraction=0.2).build(1.0, 100)
    assert [float(schedule(s)) for s in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert float(schedule(90)) == pytest.approx(0.5)
    assert float(schedule(100)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("warmup", [0, 5, 50])
@pytest.mark.parametrize("kind", [CosineConfig, TrapezoidConfig])
def test_schedules_hold_in_runs_shorter_than_their_warm_up(kind, warmup):
    schedule = kind(warmup_steps=warmup).build(1.0, 5)
    assert all(0 <= float(schedule(step)) <= 1 for step in range(6))
    assert float(schedule(0)) > 0


@pytest.mark.parametrize(("warmup", "share"), [(10, 1.0), (30, 0.8), (50, 0.6), (80, 1.0)])
def test_a_trapezoid_whose_warm_up_and_decay_overlap_still_ends_at_nothing(warmup, share):
    schedule = TrapezoidConfig(warmup_steps=warmup, decay_fraction=share).build(1.0, 100)
    assert float(schedule(warmup)) == pytest.approx(1.0)
    assert float(schedule((warmup + 100) // 2)) == pytest.approx(0.5, abs=0.01)
    assert float(schedule(100)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("dtype", "settings", "vanishing"),
    [
        ("float32", {}, []),
        ("float16", {}, ["eps"]),
        ("float16", {"eps": 1e-6}, []),
        ("bfloat16", {}, []),
        ("bfloat16", {"b2": 0.999}, ["b2"]),
        ("bfloat16", {"b1": 0.0, "weight_decay": 0.0}, []),
    ],
)
def test_settings_that_a_type_rounds_away_are_named(dtype, settings, vanishing):
    assert AdamWConfig(**settings).vanishing(jnp.dtype(dtype)) == vanishing


def test_an_optimizer_whose_settings_vanish_works_in_float32(model):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), draw(model, 0))
    half = Model(model.config.replace(param_dtype="bfloat16"))
    for b2, dtype in ((0.95, jnp.bfloat16), (0.999, jnp.float32)):
        optimizer = build_optimizer(AdamWConfig(b2=b2), half, lambda step: 0.1)
        state = optimizer.init(params)
        assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    "field", [{"learning_rate": 0.0}, {"learning_rate": float("inf")}, {"b2": 1.0}, {"weight_decay": -1.0}]
)
def test_impossible_settings_are_refused(field):
    with pytest.raises(RequestError, match=next(iter(field))):
        validate(AdamWConfig, field)
