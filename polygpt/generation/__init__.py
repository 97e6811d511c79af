"""Generation: how tokens are sampled, the compiled loop that decodes them, and the stream from ids to text."""

from polygpt.generation.beams import Beam, BeamSettings, EarlyStopping, refuse_with_beams, search_beams
from polygpt.generation.constraints import Constraint, Vocabulary, as_grammar
from polygpt.generation.continuation import Continuation, continue_all
from polygpt.generation.engine import Chunk, FinishReason, Piece, Request, check_requests, generate_tokens
from polygpt.generation.handle import Handle, Listener, Logprob, Part
from polygpt.generation.past_context import windowed
from polygpt.generation.prompts import Prompt, as_ids, as_prompts, as_samples, as_seeds, as_stop_strings
from polygpt.generation.results import Generation, ScoredGeneration
from polygpt.generation.sampling import Sampler
from polygpt.generation.serving import Engine, Statistics
from polygpt.generation.text import TextStream

__all__ = [
    "Beam",
    "BeamSettings",
    "Chunk",
    "Constraint",
    "Continuation",
    "EarlyStopping",
    "Engine",
    "FinishReason",
    "Generation",
    "Handle",
    "Listener",
    "Logprob",
    "Part",
    "Piece",
    "Prompt",
    "Request",
    "Sampler",
    "ScoredGeneration",
    "Statistics",
    "TextStream",
    "Vocabulary",
    "as_grammar",
    "as_ids",
    "as_prompts",
    "as_samples",
    "as_seeds",
    "as_stop_strings",
    "check_requests",
    "continue_all",
    "generate_tokens",
    "refuse_with_beams",
    "search_beams",
    "windowed",
]
