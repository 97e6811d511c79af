"""One layer: attention and a feed-forward around the residual stream.

`norm(name, x)`, `attend(x)` and `feed(x)` hold the layer's parameters; `feed` also gives auxiliary losses by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polygpt.model import ModelConfig
from polygpt.spec.attention import attention
from polygpt.spec.embedding import Places
from polygpt.spec.feedforward import glu, mlp
from polygpt.spec.moe import moe
from polygpt.spec.named import Named, Params
from polygpt.spec.norms import NORM
from polygpt.spec.soft_moe import causal_soft_moe, soft_moe

FEEDFORWARD = {"mlp": mlp, "glu": glu, "moe": moe, "soft_moe": soft_moe, "causal_soft_moe": causal_soft_moe}

Losses = dict[str, Named]
Norm = Callable[[str, Named], Named]
Attend = Callable[[Named], Named]
Feed = Callable[[Named], tuple[Named, Losses]]


def pre_norm(x: Named, norm: Norm, attend: Attend, feed: Feed) -> tuple[Named, Losses]:
    """h = x + attention(norm(x)); y = h + feedforward(norm(h)) (Radford et al. 2019, section 2.3)."""
    h = x + attend(norm("attention_norm", x))
    fed, losses = feed(norm("feedforward_norm", h))
    return h + fed, losses


def post_norm(x: Named, norm: Norm, attend: Attend, feed: Feed) -> tuple[Named, Losses]:
    """h = norm(x + attention(x)); y = norm(h + feedforward(h)) (Vaswani et al. 2017, section 3.1)."""
    h = norm("attention_norm", x + attend(x))
    fed, losses = feed(h)
    return norm("feedforward_norm", h + fed), losses


def sandwich(x: Named, norm: Norm, attend: Attend, feed: Feed) -> tuple[Named, Losses]:
    """h = x + norm(attention(norm(x))); y = h + norm(feedforward(norm(h))) (Ding et al. 2021, section 2.4)."""
    h = x + norm("attention_out_norm", attend(norm("attention_norm", x)))
    fed, losses = feed(norm("feedforward_norm", h))
    return h + norm("feedforward_out_norm", fed), losses


def parallel(x: Named, norm: Norm, attend: Attend, feed: Feed) -> tuple[Named, Losses]:
    """y = x + attention(norm(x)) + feedforward(norm(x)), one norm for both (Wang & Komatsuzaki 2021)."""
    normed = norm("norm", x)
    fed, losses = feed(normed)
    return x + attend(normed) + fed, losses


BLOCK = {"pre_norm": pre_norm, "post_norm": post_norm, "sandwich": sandwich, "parallel": parallel}


def layer(parts: Any, model: ModelConfig, params: Params, x: Named, at: Places, training: bool) -> tuple[Named, Losses]:
    """One layer, its four slots filled as `parts` says."""

    def norm(name: str, x: Named) -> Named:
        return NORM[parts.norm.kind](parts.norm, params.get(name, {}), x)

    def attend(x: Named) -> Named:
        return attention(parts.attention, model, params["attention"], x, at)

    def feed(x: Named) -> tuple[Named, Losses]:
        return FEEDFORWARD[parts.feedforward.kind](parts.feedforward, params["feedforward"], x, at, training)

    return BLOCK[parts.block.kind](x, norm, attend, feed)
