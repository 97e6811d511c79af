"""Feed-forwards: a file a kind; this is the menu."""

from polygpt.model.feedforward.activations import ACTIVATIONS, Activation
from polygpt.model.feedforward.glu import GLUConfig
from polygpt.model.feedforward.mlp import MLPConfig
from polygpt.model.parts import FeedForwardConfig

MENU: dict[str, type[FeedForwardConfig]] = {"mlp": MLPConfig, "glu": GLUConfig}

__all__ = ["ACTIVATIONS", "MENU", "Activation", "GLUConfig", "MLPConfig"]
