"""What a model computes on the way to its answer: token scores, attention maps, the logit lens, experts.

Everything is computed by one forward pass over a given text; nothing here is on the path of training or generation.
"""

from polygpt.inspection.layers import LensRow, attention_maps, decode_weights, expert_shares, logit_lens, pool_maps
from polygpt.inspection.scores import TokenScores, score_tokens

__all__ = [
    "LensRow",
    "TokenScores",
    "attention_maps",
    "decode_weights",
    "expert_shares",
    "logit_lens",
    "pool_maps",
    "score_tokens",
]
