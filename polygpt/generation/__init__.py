"""Generation: samplers and the compiled decode loop."""

from polygpt.generation.engine import FinishReason, generate_tokens
from polygpt.generation.samplers import Sampler

__all__ = ["FinishReason", "Sampler", "generate_tokens"]
