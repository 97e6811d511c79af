"""How the decoder knows the order of tokens, and the registry of kinds. Rotary position is in `rope.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field

from polygpt.model.parts import Initializer, PositionConfig
from polygpt.model.rope import RopeConfig, Rotation, plain_frequencies

if TYPE_CHECKING:
    from polygpt.model.config import ModelConfig

Positions = Int[Array, "B T"]
Hidden = Float[Array, "B T D"]


class NoPosition(nnx.Module):
    """Adds nothing and rotates nothing; the causal mask alone gives order (Kazemnejad et al. 2023)."""

    def embed(self, x: Hidden, positions: Positions) -> Hidden:
        return x

    def rotations(self, positions: Positions, head_sizes: Iterable[int]) -> dict[int, Rotation]:
        return {}

    def slopes(self, num_heads: int) -> Float[Array, " N"] | None:
        return None


class NoPositionConfig(PositionConfig):
    """No position at all."""

    kind: Literal["none"] = "none"
    unbounded: ClassVar[bool] = True

    def build(self, model: ModelConfig, init: Initializer) -> NoPosition:
        return NoPosition()


class LearnedPositionConfig(PositionConfig):
    """A learned vector for each position up to the context length, added to the embedding (GPT-2)."""

    kind: Literal["learned"] = "learned"

    def build(self, model: ModelConfig, init: Initializer) -> LearnedPosition:
        return LearnedPosition(model, init)


class LearnedPosition(NoPosition):
    def __init__(self, model: ModelConfig, init: Initializer):
        self.table = init.weight((model.context_length, model.width), ("position", "embed"), inputs=0)

    def embed(self, x: Hidden, positions: Positions) -> Hidden:
        return x + self.table[...][positions].astype(x.dtype)


class SinusoidalPositionConfig(PositionConfig):
    """sin(p·ω_i) in even and cos(p·ω_i) in odd dimensions, ω_i = theta^(-2i/D) (Vaswani et al. 2017, 3.5)."""

    kind: Literal["sinusoidal"] = "sinusoidal"
    unbounded: ClassVar[bool] = True
    theta: Annotated[float, Field(gt=1)] = 10000.0

    def build(self, model: ModelConfig, init: Initializer) -> SinusoidalPosition:
        return SinusoidalPosition(self)

    def check(self, model: ModelConfig) -> None:
        if model.width % 2:
            raise ValueError(f"embed_dim={model.width} is odd: 'sinusoidal' positions need pairs of dimensions")


class SinusoidalPosition(NoPosition):
    def __init__(self, config: SinusoidalPositionConfig):
        self.theta = config.theta

    def embed(self, x: Hidden, positions: Positions) -> Hidden:
        frequencies = plain_frequencies(self.theta, x.shape[-1])
        angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
        table = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(x.shape)
        return x + table.astype(x.dtype)


class AlibiConfig(PositionConfig):
    """Subtracts slope_n · (t - s) from head n's score of query t and key s (Press et al. 2022).

    slope_n = 2^(-8(n+1)/N) for N a power of two. Otherwise the slopes of the power of two below N come first, then
    every other one of those of twice that power, as the paper's code has it.
    """

    kind: Literal["alibi"] = "alibi"
    unbounded: ClassVar[bool] = True

    def build(self, model: ModelConfig, init: Initializer) -> Alibi:
        return Alibi()


class Alibi(NoPosition):
    def slopes(self, num_heads: int) -> Float[Array, " N"]:
        return jnp.asarray(_alibi_slopes(num_heads), jnp.float32)


def _alibi_slopes(num_heads: int) -> list[float]:
    power = 2 ** (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (n + 1) / power) for n in range(power)]
    if power < num_heads:
        slopes += [2.0 ** (-8 * (n + 1) / (2 * power)) for n in range(0, 2 * (num_heads - power), 2)]
    return slopes


REGISTRY: dict[str, type[PositionConfig]] = {
    "learned": LearnedPositionConfig,
    "sinusoidal": SinusoidalPositionConfig,
    "rope": RopeConfig,
    "alibi": AlibiConfig,
    "none": NoPositionConfig,
}
