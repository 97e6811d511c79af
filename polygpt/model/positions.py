"""How the decoder knows the order of tokens. Angles are float32 always: in bfloat16 they collapse past 256."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, field_validator

from polygpt.model.parts import Initializer, PositionConfig

Positions = Int[Array, "B T"]
Hidden = Float[Array, "B T D"]


class Rotation(NamedTuple):
    """cos and sin of the RoPE angles, float32 [B, T, H/2]."""

    cos: Float[Array, "B T H/2"]
    sin: Float[Array, "B T H/2"]


class NoPosition(nnx.Module):
    """Adds nothing and rotates nothing; the causal mask alone gives order (Kazemnejad et al. 2023)."""

    def embed(self, x: Hidden, positions: Positions) -> Hidden:
        return x

    def rotations(self, positions: Positions, head_sizes: Iterable[int]) -> dict[int, Rotation]:
        return {}


class NoPositionConfig(PositionConfig):
    """No position at all."""

    kind: Literal["none"] = "none"

    def build(self, model, init: Initializer) -> NoPosition:
        return NoPosition()


class LearnedPositionConfig(PositionConfig):
    """A learned vector for each position up to the context length, added to the embedding (GPT-2)."""

    kind: Literal["learned"] = "learned"

    def build(self, model, init: Initializer) -> LearnedPosition:
        return LearnedPosition(model, init)


class LearnedPosition(NoPosition):
    def __init__(self, model, init: Initializer):
        self.table = init.weight((model.context_length, model.width), ("position", "embed"), inputs=0)

    def embed(self, x: Hidden, positions: Positions) -> Hidden:
        return x + self.table[...][positions].astype(x.dtype)


class SinusoidalPositionConfig(PositionConfig):
    """sin(p·ω_i) in even and cos(p·ω_i) in odd dimensions, ω_i = theta^(-2i/D) (Vaswani et al. 2017, 3.5)."""

    kind: Literal["sinusoidal"] = "sinusoidal"
    theta: Annotated[float, Field(gt=1)] = 10000.0

    def build(self, model, init: Initializer) -> SinusoidalPosition:
        return SinusoidalPosition(self)

    def check(self, model) -> None:
        if model.width % 2:
            raise ValueError(f"embed_dim={model.width} is odd: 'sinusoidal' positions need pairs of dimensions")


class SinusoidalPosition(NoPosition):
    def __init__(self, config: SinusoidalPositionConfig):
        self.theta = config.theta

    def embed(self, x: Hidden, positions: Positions) -> Hidden:
        angles = _angles(positions, x.shape[-1], self.theta)
        table = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(x.shape)
        return x + table.astype(x.dtype)


class RopeConfig(PositionConfig):
    """Rotates each pair (i, i + H/2) of a query or key by p·theta^(-2i/H) (Su et al. 2021, eq. 15).

    `theta` is the base, usually 10000. Its inverse, under which some texts quote it (1e-4), is accepted and
    stored as the base.
    """

    kind: Literal["rope"] = "rope"
    theta: Annotated[float, Field(gt=0)] = 10000.0

    @field_validator("theta", mode="after")
    @classmethod
    def _as_base(cls, theta: float) -> float:
        return round(1 / theta, 6) if theta < 1 else theta

    def build(self, model, init: Initializer) -> Rope:
        return Rope(self)

    def check(self, model) -> None:
        for layer in model.layers:
            size = layer.attention.rotation_size(model)
            if size is not None and size % 2:
                raise ValueError(f"head_dim={size} is odd: 'rope' rotates pairs of dimensions; make it even")


class Rope(NoPosition):
    def __init__(self, config: RopeConfig):
        self.theta = config.theta

    def rotations(self, positions: Positions, head_sizes: Iterable[int]) -> dict[int, Rotation]:
        angles = {size: _angles(positions, size, self.theta) for size in head_sizes}
        return {size: Rotation(jnp.cos(a), jnp.sin(a)) for size, a in angles.items()}


def _angles(positions: Positions, size: int, theta: float) -> Float[Array, "B T size/2"]:
    frequencies = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    return positions[..., None].astype(jnp.float32) * frequencies


def rotate(x: Float[Array, "B T N H"], rotation: Rotation | None) -> Float[Array, "B T N H"]:
    """`x` rotated by the angles of its positions, rotate-half pairing; `x` itself without a rotation."""
    if rotation is None:
        return x
    cos, sin = rotation.cos[:, :, None, :], rotation.sin[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


MENU: dict[str, type[PositionConfig]] = {
    "learned": LearnedPositionConfig,
    "sinusoidal": SinusoidalPositionConfig,
    "rope": RopeConfig,
    "none": NoPositionConfig,
}
