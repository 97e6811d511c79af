"""Generation: how tokens are sampled, the compiled loop that decodes them, and the stream from ids to text."""

from polygpt.generation.continuation import Continuation, continue_all
from polygpt.generation.engine import Chunk, FinishReason, Piece, Request, generate_tokens
from polygpt.generation.handle import Handle, Logprob, Part
from polygpt.generation.prompts import Prompt, as_ids, as_prompts, as_seeds, as_stop_strings
from polygpt.generation.sampling import Sampler
from polygpt.generation.serving import Engine
from polygpt.generation.text import TextStream

__all__ = [
    "Chunk",
    "Continuation",
    "Engine",
    "FinishReason",
    "Handle",
    "Logprob",
    "Part",
    "Piece",
    "Prompt",
    "Request",
    "Sampler",
    "TextStream",
    "as_ids",
    "as_prompts",
    "as_seeds",
    "as_stop_strings",
    "continue_all",
    "generate_tokens",
]
