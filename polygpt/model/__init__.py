"""One decoder whose parts are chosen by name.

The legend of axis letters, for every einsum and every shape in the project:
    B batch, T query position, S key position, D embedding, N heads, K kv heads, G query heads a kv head,
    H head size, F feed-forward hidden, E experts, C expert slots, V vocabulary.
"""

from polygpt.model.block import BlockConfig
from polygpt.model.config import LayerConfig, ModelConfig
from polygpt.model.decoder import Decoder, Loads, Output, matmul_precision
from polygpt.model.model import Model, ParameterInfo, Params, model_of
from polygpt.model.parts import (
    NO_EFFECTS,
    AttentionConfig,
    Context,
    Effects,
    FeedForwardConfig,
    Initializer,
    NormConfig,
    PositionConfig,
    Scope,
    architecture,
    dense,
    dropout,
)

__all__ = [
    "NO_EFFECTS",
    "AttentionConfig",
    "BlockConfig",
    "Context",
    "Decoder",
    "Effects",
    "FeedForwardConfig",
    "Initializer",
    "LayerConfig",
    "Loads",
    "Model",
    "ModelConfig",
    "NormConfig",
    "Output",
    "ParameterInfo",
    "Params",
    "PositionConfig",
    "Scope",
    "architecture",
    "dense",
    "dropout",
    "matmul_precision",
    "model_of",
]
