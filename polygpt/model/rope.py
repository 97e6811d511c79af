"""`rope`: rotary position, and the ways of stretching it beyond the length it was trained at.

Each pair (i, i + R/2) of the first R dimensions of a query or key is rotated by position · frequency_i. The scalings
change the frequencies; angles are always float32 (in bfloat16 they collapse past position 256).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, PositiveInt, field_validator, model_validator

from polygpt.config import PartConfig, slot
from polygpt.model.parts import Initializer, PositionConfig

if TYPE_CHECKING:
    from polygpt.model.config import ModelConfig

Factor = Annotated[float, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class Rotation(NamedTuple):
    """cos and sin of the angles, float32 [B, T, R/2]; R, the rotated dimensions, may be fewer than the head's."""

    cos: Float[Array, "B T R/2"]
    sin: Float[Array, "B T R/2"]


class RopeScaling(PartConfig):
    """The slot `position.scaling`."""

    def frequencies(self, theta: float, size: int) -> np.ndarray:
        """The angle by which each pair is rotated per position, float64 [size/2]."""
        raise NotImplementedError

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by."""
        return 1.0


class LinearScaling(RopeScaling):
    """ω_i = theta^(-2i/R) / factor: positions squeezed by the factor (Chen et al. 2023)."""

    kind: Literal["linear"] = "linear"
    factor: Factor

    def frequencies(self, theta: float, size: int) -> np.ndarray:
        return plain_frequencies(theta, size) / self.factor


class NTKScaling(RopeScaling):
    """ω_i of the base theta · factor^(R/(R-2)): the slowest pair slows by the factor, the fastest not at all.

    "NTK-aware" scaling (bloc97 2023; Peng et al. 2023, definition 1).
    """

    kind: Literal["ntk"] = "ntk"
    factor: Factor

    def frequencies(self, theta: float, size: int) -> np.ndarray:
        base = theta * self.factor ** (size / (size - 2)) if size > 2 else theta
        return plain_frequencies(base, size)


class YarnScaling(RopeScaling):
    """Slow pairs are squeezed as by `linear`, fast ones kept, with a ramp between (Peng et al. 2023, section 3.2-3.4).

    r(ω) = original_context_length · ω / 2π is the number of full rotations of a pair in the original context. Pairs
    with more than `beta_fast` rotations are kept, those with fewer than `beta_slow` squeezed. The ramp is linear in the
    pair's index i, between the (rounded down, rounded up) indices at which r equals the two, clipped to 0 and R-1. cos
    and sin are multiplied by `attention_factor`, by default 0.1·ln(factor) + 1.
    """

    kind: Literal["yarn"] = "yarn"
    factor: Factor
    original_context_length: PositiveInt
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Positive | None = None

    @model_validator(mode="after")
    def _ordered(self) -> YarnScaling:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast} must be greater than beta_slow={self.beta_slow}")
        return self

    def frequencies(self, theta: float, size: int) -> np.ndarray:
        def index(turns: float) -> float:
            return size * math.log(self.original_context_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = max(math.floor(index(self.beta_fast)), 0), min(math.ceil(index(self.beta_slow)), size - 1)
        # At least a thousandth wide: where both fall on one index the ramp is a step, not 0/0.
        squeezed = np.clip((np.arange(size // 2) - low) / max(high - low, 1e-3), 0, 1)
        plain = plain_frequencies(theta, size)
        return plain * (1 - squeezed) + plain / self.factor * squeezed

    @property
    def magnitude(self) -> float:
        return self.attention_factor or 0.1 * math.log(self.factor) + 1


class Llama3Scaling(RopeScaling):
    """As Llama 3.1: pairs of a wavelength 2π/ω beyond original/low_freq_factor are squeezed by the factor.

    Those below original/high_freq_factor are kept; between them the two are mixed by
    s = (original/wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor), s the share kept (Dubey et al.
    2024; the reference code's `apply_scaling`).
    """

    kind: Literal["llama3"] = "llama3"
    factor: Factor
    original_context_length: PositiveInt = 8192
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0

    @model_validator(mode="after")
    def _ordered(self) -> Llama3Scaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must be greater than low_freq_factor={self.low_freq_factor}"
            )
        return self

    def frequencies(self, theta: float, size: int) -> np.ndarray:
        plain = plain_frequencies(theta, size)
        turns = self.original_context_length * plain / (2 * math.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return plain * kept + plain / self.factor * (1 - kept)


SCALINGS: dict[str, type[RopeScaling]] = {
    "linear": LinearScaling,
    "ntk": NTKScaling,
    "yarn": YarnScaling,
    "llama3": Llama3Scaling,
}
ScalingSlot = slot(RopeScaling, SCALINGS)


class RopeConfig(PositionConfig):
    """Rotates each pair (i, i + R/2) of a query or key by p·theta^(-2i/R) (Su et al. 2021, eq. 15).

    R is the head size, or the share `fraction` of it (rounded down): the rest then passes unrotated (Black et al. 2022,
    GPT-NeoX). `theta` is the base, usually 10000. Its inverse, under which some texts quote it (1e-4), is accepted and
    stored as the base.
    """

    kind: Literal["rope"] = "rope"
    unbounded: ClassVar[bool] = True
    theta: Positive = 10000.0
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    scaling: ScalingSlot | None = None

    @field_validator("theta", mode="after")
    @classmethod
    def _as_base(cls, theta: float) -> float:
        return round(1 / theta, 6) if theta < 1 else theta

    @model_validator(mode="after")
    def _theta_differs_from_one(self) -> RopeConfig:
        if self.theta == 1.0:
            raise ValueError("theta=1 rotates every pair alike; it must differ from 1 (usually 10000)")
        return self

    def rotated_size(self, head_size: int) -> int:
        """R, the dimensions of a head that are rotated."""
        return int(head_size * self.fraction)

    def build(self, model: ModelConfig, init: Initializer) -> Rope:
        return Rope(self)

    def check(self, model: ModelConfig) -> None:
        for layer in model.layers:
            size = layer.attention.rotation_size(model)
            if size is None:
                continue
            rotated = self.rotated_size(size)
            if rotated % 2 or not rotated:
                share = f" · fraction={self.fraction} = {rotated}" if self.fraction != 1 else ""
                raise ValueError(
                    f"head_dim={size}{share} is not even: 'rope' rotates pairs of dimensions; change num_heads or "
                    "embed_dim, or set attention.head_dim"
                )


class Rope(nnx.Module):
    """Adds nothing to the embedding; gives the tables by which attention rotates."""

    def __init__(self, config: RopeConfig):
        self.config = config

    def embed(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return x

    def slopes(self, num_heads: int) -> None:
        return None

    def rotations(self, positions: Int[Array, "B T"], head_sizes: Iterable[int]) -> dict[int, Rotation]:
        return {size: self._rotation(positions, self.config.rotated_size(size)) for size in head_sizes}

    def _rotation(self, positions: Int[Array, "B T"], size: int) -> Rotation:
        theta, scaling = self.config.theta, self.config.scaling
        frequencies = plain_frequencies(theta, size) if scaling is None else scaling.frequencies(theta, size)
        angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
        magnitude = 1.0 if scaling is None else scaling.magnitude
        return Rotation(jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude)


def plain_frequencies(theta: float, size: int) -> np.ndarray:
    """ω_i = theta^(-2i/size), float64 [size/2]."""
    return theta ** (-np.arange(0, size, 2) / size)


def rotate(x: Float[Array, "B T N H"], rotation: Rotation | None) -> Float[Array, "B T N H"]:
    """`x` with its first R dimensions rotated, rotate-half pairing; `x` itself without a rotation."""
    if rotation is None:
        return x
    cos, sin = rotation.cos[:, :, None, :], rotation.sin[:, :, None, :]
    half = cos.shape[-1]
    x32 = x.astype(jnp.float32)
    first, second, rest = x32[..., :half], x32[..., half : 2 * half], x32[..., 2 * half :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return rotated.astype(x.dtype)
