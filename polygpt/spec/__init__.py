"""The models once more, as one would teach them: plain functions over arrays with named axes.

It shares nothing with the decoder but its configuration, and so is what the decoder is tested against. In reading
order: `named`, `embedding`, `norms`, `position`, `rope`, `attention`, `feedforward`, `moe`, `soft_moe`, `block`,
`decoder`; `docs/the-model.md` is the guide.

The axes:
    batch         sequences                       heads      query heads
    sequence      tokens of a sequence            kv_heads   key and value heads
    key_sequence  the same, as what is looked at  head_dim   dimensions of a head
    embed         the residual stream             pair       pairs of them that turn together (RoPE)
    vocab         tokens there are                mlp        hidden units of a feed-forward
    position      rows of the position table      expert     experts
    layers        layers of one pattern entry     choice     the experts of a token, best first
                                                  slot       slots of an expert (soft mixture)
"""

from polygpt.spec.attention import ATTENTION, attention
from polygpt.spec.block import BLOCK, FEEDFORWARD
from polygpt.spec.decoder import Output, decoder, logits, loss, nll
from polygpt.spec.embedding import Places, embed, places, visible
from polygpt.spec.feedforward import ACTIVATION
from polygpt.spec.moe import CLAIM_ORDER
from polygpt.spec.named import Named, name_parameters
from polygpt.spec.norms import NORM
from polygpt.spec.position import POSITION, Position
from polygpt.spec.rope import ROPE_SCALING

__all__ = [
    "ACTIVATION",
    "ATTENTION",
    "BLOCK",
    "CLAIM_ORDER",
    "FEEDFORWARD",
    "NORM",
    "POSITION",
    "ROPE_SCALING",
    "Named",
    "Output",
    "Places",
    "Position",
    "attention",
    "decoder",
    "embed",
    "logits",
    "loss",
    "name_parameters",
    "nll",
    "places",
    "visible",
]
