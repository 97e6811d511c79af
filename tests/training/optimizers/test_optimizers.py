"""Optimizers against their equations, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.model import Model, ModelConfig
from polygpt.training import TrainingConfig
from polygpt.training.optimizers import (
    OPTIMIZERS,
    AdafactorConfig,
    AdamWConfig,
    LionConfig,
    MuonConfig,
    ScheduleFreeConfig,
    SGDConfig,
    build_optimizer,
    start_average,
    update_average,
)

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


def in_float64(tree):
    return {path: np.asarray(leaf, np.float64) for path, leaf in flatten_dict(tree).items()}


def decay_of(model, path):
    return float(flatten_dict(model.parameters)[path].inputs is not None)


def after_updates(config, model, learning_rate, params, gradients):
    """The last parameters, by path."""
    optimizer = build_optimizer(config, model, learning_rate)
    return in_float64(list(updates(optimizer, params, gradients))[-1])


def test_lion_is_its_equation(model):
    params, gradients = draw(model, 0), [draw(model, seed) for seed in (1, 2, 3)]
    config = LionConfig(b1=0.8, b2=0.6, weight_decay=0.5)
    found = after_updates(config, model, lambda step: 0.1 / (1 + step), params, gradients)
    for path, value in in_float64(params).items():
        m = 0
        for t, gradient in enumerate(gradients, 1):
            g = in_float64(gradient)[path]
            value = value - 0.1 / t * (np.sign(0.8 * m + 0.2 * g) + 0.5 * decay_of(model, path) * value)
            m = 0.6 * m + 0.4 * g
        np.testing.assert_allclose(found[path], value, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_its_equation(model, momentum, nesterov):
    params, gradients = draw(model, 0), [draw(model, seed) for seed in (1, 2, 3)]
    config = SGDConfig(momentum=momentum, nesterov=nesterov, weight_decay=0.5)
    found = after_updates(config, model, lambda step: 0.1, params, gradients)
    for path, value in in_float64(params).items():
        m = 0
        for gradient in gradients:
            g = in_float64(gradient)[path]
            m = momentum * m + g
            direction = g + momentum * m if nesterov else m
            value = value - 0.1 * (direction + 0.5 * decay_of(model, path) * value)
        np.testing.assert_allclose(found[path], value, rtol=2e-5, atol=1e-6)


def test_schedule_free_is_its_equations_and_evaluates_the_average(model):
    params, gradients = draw(model, 0), [draw(model, seed) for seed in (1, 2, 3, 4)]
    config = ScheduleFreeConfig(b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.5)
    rates = [0.05, 0.1, 0.1, 0.07]
    optimizer = build_optimizer(config, model, lambda step: jnp.asarray(rates)[step])
    state, y, update = jax.jit(optimizer.init)(params), params, jax.jit(optimizer.update)
    for gradient in gradients:
        change, state = update(gradient, state, y)
        y = jax.tree.map(jnp.add, y, change)
    found_y, found_x = in_float64(y), in_float64(jax.jit(optimizer.evaluated)(state, y))
    for path, value in in_float64(params).items():
        x = z = point = value
        v, weights, largest = 0, 0, 0
        for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
            g = in_float64(gradient)[path]
            v = 0.9 * v + 0.1 * g**2
            z = z - rate * (g / (np.sqrt(v / (1 - 0.9**t)) + 1e-3) + 0.5 * decay_of(model, path) * point)
            largest = max(largest, rate)
            weights += largest**2
            x = (1 - largest**2 / weights) * x + largest**2 / weights * z
            point = 0.2 * z + 0.8 * x
        np.testing.assert_allclose(found_y[path], point, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found_x[path], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relative", [True, False])
def test_adafactor_factors_the_matrix_of_each_layer_by_itself(model, relative):
    params, gradients = draw(model, 0), [draw(model, seed) for seed in (1, 2, 3)]
    config = AdafactorConfig(min_dim_to_factor=4, relative=relative, clipping_threshold=0.9)
    path = ("blocks", 0, "attention", "query")
    found = after_updates(config, model, lambda step: 0.01, params, gradients)[path]

    def rms(values):
        return np.sqrt(np.mean(values**2))

    for layer in range(2):
        value, rows, columns = in_float64(params)[path][layer].reshape(8, 8), 0, 0
        for t, gradient in enumerate(gradients, 1):
            g, decay = in_float64(gradient)[path][layer].reshape(8, 8), 1 - t**-0.8
            rows = decay * rows + (1 - decay) * (g**2).mean(1)
            columns = decay * columns + (1 - decay) * (g**2).mean(0)
            direction = g / np.sqrt(np.outer(rows, columns) / rows.mean())
            direction /= max(1, rms(direction) / 0.9)
            value = value - 0.01 * direction * (rms(value) if relative else 1)
        np.testing.assert_allclose(found[layer].reshape(8, 8), value, rtol=1e-4, atol=1e-6)


def test_adafactors_memory_is_that_of_rows_and_columns(model):
    optimizer = build_optimizer(AdafactorConfig(min_dim_to_factor=4), model, lambda step: 0.01)
    state = jax.eval_shape(optimizer.init, draw(model, 0))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 0.7 * model.num_parameters


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


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [({"eps": 1e-46}, "eps=1e-46 is 0 in float32"), ({"b2": 1 - 1e-12}, r"b2=0\.999999999999 is 1 in float32")],
)
def test_settings_that_float32_rounds_away_are_refused(setting, complaint):
    with pytest.raises(RequestError, match=complaint):
        validate(AdamWConfig, {"learning_rate": 0.1, **setting})


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


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_kind_works_in_16_bits_and_keeps_the_types_of_its_parameters(model, kind, dtype):
    half = Model(model.config.replace(param_dtype=dtype))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), draw(model, 0))
    optimizer = build_optimizer(OPTIMIZERS[kind](), half, lambda step: 0.01)
    state = jax.jit(optimizer.init)(params)
    change, after = jax.jit(optimizer.update)(jax.tree.map(lambda leaf: leaf / 100, params), state, params)
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, state)
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves((change, after)))
    evaluated = jax.eval_shape(optimizer.evaluated, after, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(evaluated)} == {jnp.dtype(dtype)}


def test_the_moving_average_is_its_recurrence_with_a_decay_that_warms_up():
    weights = [{"w": jnp.full(2, value, jnp.bfloat16)} for value in (1.0, 2.0, 4.0, 8.0)]
    average, expected = start_average(weights[0]), 1.0
    assert average["w"].dtype == jnp.float32
    for t, params in enumerate(weights[1:], 1):
        average = update_average(average, params, 0.25, jnp.int32(t))
        decay = min(0.25, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * float(params["w"][0])
        np.testing.assert_allclose(average["w"], expected, rtol=1e-6)


def test_schedule_free_has_a_constant_schedule_by_default_and_no_second_average():
    fields = {"steps": 10, "batch_size": 1, "optimizer": {"kind": "schedule_free"}}
    for changes, kind, warmup in (
        ({}, "constant", 0.05),
        ({"optimizer": "schedule_free"}, "constant", 0.05),
        ({"schedule": {"warmup_steps": 3}}, "constant", 3),
        ({"schedule": {"kind": "cosine"}}, "cosine", 0),
        ({"optimizer": "adamw"}, "cosine", 0),
    ):
        schedule = validate(TrainingConfig, fields | changes).schedule
        assert (schedule.kind, schedule.warmup_steps) == (kind, warmup)
    with pytest.raises(RequestError, match="ema_decay: schedule_free averages the weights already"):
        validate(TrainingConfig, fields | {"ema_decay": 0.9})
