"""Feed-forwards: one file for each kind, and the registry of kinds."""

from polygpt.model.feedforward.activations import ACTIVATIONS, Activation
from polygpt.model.feedforward.glu import GLUConfig
from polygpt.model.feedforward.mlp import MLPConfig
from polygpt.model.feedforward.moe import MoEConfig
from polygpt.model.feedforward.soft_moe import CausalSoftMoEConfig, SoftMoEConfig
from polygpt.model.parts import FeedForwardConfig

REGISTRY: dict[str, type[FeedForwardConfig]] = {
    "mlp": MLPConfig,
    "glu": GLUConfig,
    "moe": MoEConfig,
    "soft_moe": SoftMoEConfig,
    "causal_soft_moe": CausalSoftMoEConfig,
}

__all__ = [
    "ACTIVATIONS",
    "REGISTRY",
    "Activation",
    "CausalSoftMoEConfig",
    "GLUConfig",
    "MLPConfig",
    "MoEConfig",
    "SoftMoEConfig",
]
