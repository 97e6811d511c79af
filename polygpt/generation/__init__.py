"""Generation: how tokens are sampled, the engine that decodes them, and the stream from ids to text."""

from polygpt.generation.beams import Beam, BeamSettings, EarlyStopping, refuse_with_beams, search_beams
from polygpt.generation.constraints import Constraint, Vocabulary, as_grammar
from polygpt.generation.engine import Engine
from polygpt.generation.handle import Handle, Listener, Logprob, Part
from polygpt.generation.past_context import windowed
from polygpt.generation.prompts import Prompt, as_ids, as_prompts, as_seeds, as_settings, as_stop_strings, as_whole
from polygpt.generation.requests import FinishReason, Request, check_requests
from polygpt.generation.results import Generation, ScoredGeneration
from polygpt.generation.running import engine_for, run_all
from polygpt.generation.sampling import DAMAGED, Sampler
from polygpt.generation.speculation import Draft, Speculation
from polygpt.generation.statistics import Statistics
from polygpt.generation.text import TextStream

__all__ = [
    "DAMAGED",
    "Beam",
    "BeamSettings",
    "Constraint",
    "Draft",
    "EarlyStopping",
    "Engine",
    "FinishReason",
    "Generation",
    "Handle",
    "Listener",
    "Logprob",
    "Part",
    "Prompt",
    "Request",
    "Sampler",
    "ScoredGeneration",
    "Speculation",
    "Statistics",
    "TextStream",
    "Vocabulary",
    "as_grammar",
    "as_ids",
    "as_prompts",
    "as_seeds",
    "as_settings",
    "as_stop_strings",
    "as_whole",
    "check_requests",
    "engine_for",
    "refuse_with_beams",
    "run_all",
    "search_beams",
    "windowed",
]
