"""`local`: softmax attention within a sliding window (Beltagy et al. 2020)."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from polygpt.model.attention.softmax import SoftmaxAttentionConfig


class LocalAttentionConfig(SoftmaxAttentionConfig):
    """`softmax` with the window required: the same code, under the name that says what it is for."""

    kind: Literal["local"] = "local"
    window: PositiveInt
