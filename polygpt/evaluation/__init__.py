"""Evaluation: how well a model predicts text, what it chooses, and what its likelihood is measured against.

`EVALUATIONS` is the registry of what `polygpt eval` and `training.evaluations` do; the functions behind it work on any
`LanguageModel`.
"""

from polygpt.evaluation.bar import progress_bar
from polygpt.evaluation.baselines import bigram_bits_per_byte, gzip_bits_per_byte, held_out_text, xz_bits_per_byte
from polygpt.evaluation.harness import register_harness_model
from polygpt.evaluation.hellaswag import (
    Choice,
    HellaSwagResult,
    Question,
    choose_endings,
    encode_questions,
    read_questions,
)
from polygpt.evaluation.perplexity import PerplexityResult, Text, encode_text, perplexity, read_text
from polygpt.evaluation.scoring import ProgressCallback, Row, Score, score_continuations, score_rows
from polygpt.evaluation.tasks import (
    EVALUATIONS,
    EvaluationConfig,
    HarnessConfig,
    HellaSwagConfig,
    Outcome,
    PerplexityConfig,
    Ready,
)

__all__ = [
    "EVALUATIONS",
    "Choice",
    "EvaluationConfig",
    "HarnessConfig",
    "HellaSwagConfig",
    "HellaSwagResult",
    "Outcome",
    "PerplexityConfig",
    "PerplexityResult",
    "ProgressCallback",
    "Question",
    "Ready",
    "Row",
    "Score",
    "Text",
    "bigram_bits_per_byte",
    "choose_endings",
    "encode_questions",
    "encode_text",
    "gzip_bits_per_byte",
    "held_out_text",
    "perplexity",
    "progress_bar",
    "read_questions",
    "read_text",
    "register_harness_model",
    "score_continuations",
    "score_rows",
    "xz_bits_per_byte",
]
