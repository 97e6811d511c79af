"""Tiny models of every shape the menus allow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.config import merge, validate
from polygpt.model import Model, ModelConfig

BASE = {
    "vocab_size": 37,
    "context_length": 24,
    "embed_dim": 16,
    "num_layers": 2,
    "position": {"kind": "rope"},
    "norm": {"kind": "rmsnorm"},
    "attention": {"kind": "softmax", "num_heads": 4, "num_kv_heads": 2},
    "feedforward": {"kind": "glu", "mlp_dim": 24},
}


def tiny(**changes) -> ModelConfig:
    return validate(ModelConfig, merge(BASE, changes))


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config(**changes)`: a tiny model with fields changed."""
    return tiny


@pytest.fixture(scope="session")
def lively():
    """`lively(model)`: parameters in which every gain, bias and table matters.

    Drawn by NumPy: compiling JAX's generators for every shape takes longer than the tests themselves.
    """

    def draw(model: Model, seed: int = 0):
        random = np.random.default_rng(seed)

        def parameter(info):
            centre = 1.0 if info.inputs is None else 0.0  # gains, and with them biases
            return jnp.asarray(centre + 0.3 * random.standard_normal(info.shape), info.dtype)

        return jax.tree.map(parameter, model.parameters)

    return draw


@pytest.fixture
def tokens():
    return jnp.asarray(np.random.default_rng(7).integers(0, 37, (2, 24)), jnp.int32)
