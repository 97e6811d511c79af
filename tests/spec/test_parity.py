"""The decoder against its specification: logits, auxiliary losses, every parameter's gradient, for every kind."""

import ast
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from polygpt import spec
from polygpt.config import validate
from polygpt.model import Model, ModelConfig
from polygpt.model.attention import REGISTRY as ATTENTION
from polygpt.model.block import REGISTRY as BLOCK
from polygpt.model.feedforward import ACTIVATIONS
from polygpt.model.feedforward import REGISTRY as FEEDFORWARD
from polygpt.model.norms import REGISTRY as NORM
from polygpt.model.positions import REGISTRY as POSITION
from polygpt.model.rope import SCALINGS
from polygpt.presets import PRESETS

TOLERANCE = 1e-5


class Found(NamedTuple):
    """What one side computed."""

    logits: np.ndarray
    losses: dict[str, np.ndarray]
    gradient: dict[str, Any]


def compute(forward, params: dict[str, Any]) -> Found:
    """`forward` gives logits and auxiliary losses; the gradient is that of all of them, weighted at random."""
    weights = np.random.default_rng(3).standard_normal((2, zoo.LENGTH, zoo.VOCAB)).astype(np.float32)

    def objective(params):
        logits, losses = forward(params)
        return (logits * weights).sum() + 50 * losses.get("load_balance", 0) + 20 * losses.get("z_loss", 0), (
            logits,
            losses,
        )

    gradient, found = jax.jit(jax.grad(objective, has_aux=True))(params)
    return Found(*jax.device_get((*found, gradient)))


def of_decoder(model: Model, params: dict[str, Any], tokens: np.ndarray, inputs: dict[str, Any]) -> Found:
    def forward(params):
        out = model.hidden(params, tokens, **inputs)
        return model.module(params).logits(out.hidden), out.effects.losses

    return compute(forward, params)


def of_specification(model: Model, params: dict[str, Any], tokens: np.ndarray, inputs: dict[str, Any]) -> Found:
    axes = jax.tree.map(lambda info: info.axes, model.parameters)

    def forward(params):
        out = spec.decoder(model.config, spec.name_parameters(params, axes), tokens, **inputs)
        losses = {name: loss.unwrap() for name, loss in out.losses.items()}
        return out.logits.unwrap("batch", "sequence", "vocab"), losses

    return compute(forward, params)


@functools.cache
def assert_agreement(config: ModelConfig, training: bool = False, packed: str | None = None) -> None:
    model = Model(config)
    params = zoo.lively(model)
    tokens = jnp.asarray(np.random.default_rng(7).integers(0, zoo.VOCAB, (2, zoo.LENGTH), np.int32))
    documents = None if packed is None else jnp.asarray(zoo.DOCUMENTS[packed])
    inputs = {"training": training, "segment_ids": documents}
    found, expected = (side(model, params, tokens, inputs) for side in (of_decoder, of_specification))
    assert np.isfinite(expected.logits).all()
    assert np.ptp(expected.logits) > 0.1
    np.testing.assert_allclose(
        found.logits, expected.logits, rtol=0, atol=TOLERANCE * np.abs(expected.logits).max(), err_msg="logits"
    )
    assert set(found.losses) == set(expected.losses)
    for name, loss in expected.losses.items():
        assert float(found.losses[name]) == pytest.approx(float(loss), rel=TOLERANCE), name
    # Some gradients are 0 but for rounding: a key's bias, to which the softmax is blind.
    rounding = 3e-7 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected.gradient))
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected.gradient):
        mine = found.gradient
        for step in path:
            mine = mine[step.key]
        difference, size = np.abs(mine - leaf).max(), np.abs(leaf).max()
        assert difference <= TOLERANCE * size + rounding, f"{jax.tree_util.keystr(path)}: {difference} of {size}"


@pytest.mark.parametrize("name", zoo.CASES)
def test_decoder_and_specification_agree(name):
    case = zoo.CASES[name]
    assert_agreement(zoo.config_of(case), case.training, case.packed)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_agrees_with_its_specification(name):
    config = validate(ModelConfig, zoo.shrunk(name))
    assert_agreement(config)
    if {layer.feedforward.kind for layer in config.layers} & {"moe", "soft_moe"}:
        assert_agreement(config, training=True)


def test_the_loss_agrees():
    model = Model(zoo.config_of(zoo.CASES["moe-claims-by-token"]))
    params = zoo.lively(model)
    tokens, targets = np.random.default_rng(7).integers(0, zoo.VOCAB, (2, 2, zoo.LENGTH), np.int32)
    weights = np.full(tokens.shape, 1 / tokens.size, np.float32)
    nats, effects = jax.jit(model.loss)(params, tokens, targets, weights)
    axes = jax.tree.map(lambda info: info.axes, model.parameters)
    named = spec.name_parameters(params, axes)
    expected = jax.jit(spec.loss, static_argnums=0)(model.config, named, tokens, targets)
    assert float(nats + sum(effects.losses.values())) == pytest.approx(float(expected.unwrap()), rel=TOLERANCE)


def test_the_specification_takes_nothing_of_the_model_but_its_configuration():
    for path in Path(spec.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("polygpt"):
                taken = {alias.name for alias in node.names}
                assert node.module.startswith("polygpt.spec") or taken == {"ModelConfig"}, path.name


def test_every_menu_entry_has_a_specification():
    assert set(spec.ATTENTION) == set(ATTENTION)
    assert set(spec.FEEDFORWARD) == set(FEEDFORWARD)
    assert set(spec.NORM) == set(NORM)
    assert set(spec.POSITION) == set(POSITION)
    assert set(spec.BLOCK) == set(BLOCK)
    assert set(spec.ROPE_SCALING) == set(SCALINGS)
    assert set(spec.ACTIVATION) == set(ACTIVATIONS)
    assert set(spec.CLAIM_ORDER) == set(zoo.CLAIM_ORDERS)
