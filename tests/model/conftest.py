"""Tiny models of every shape the registries allow."""

import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from polygpt.config import merge, validate
from polygpt.model import ModelConfig

BASE = zoo.BASE | {"num_layers": 2, "feedforward": {"kind": "glu", "mlp_dim": 24}}


def tiny(**changes) -> ModelConfig:
    return validate(ModelConfig, merge(BASE, changes))


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config(**changes)`: a tiny model with fields changed."""
    return tiny


@pytest.fixture(scope="session")
def lively():
    """`lively(model)`: parameters in which every gain, bias and table matters."""
    return zoo.lively


@pytest.fixture
def tokens():
    return jnp.asarray(np.random.default_rng(7).integers(0, 37, (2, 24)), jnp.int32)
