"""Normalisation of the hidden states. Statistics are float32 whatever the compute dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float
from pydantic import Field

from polygpt.kernels import in_float32
from polygpt.model.parts import Initializer, NormConfig

if TYPE_CHECKING:
    from polygpt.model.config import ModelConfig

Epsilon = Annotated[float, Field(gt=0, le=1e-1)]


class LayerNormConfig(NormConfig):
    """y = (x - mean) / sqrt(var + eps) · gain + bias (Ba et al. 2016)."""

    kind: Literal["layernorm"] = "layernorm"
    eps: Epsilon = 1e-5
    bias: bool = True

    def build(self, model: ModelConfig, init: Initializer) -> LayerNorm:
        return LayerNorm(self, model.width, init)


class LayerNorm(nnx.Module):
    def __init__(self, config: LayerNormConfig, width: int, init: Initializer):
        self.eps = config.eps
        self.gain = init.constant(1.0, (width,), ("embed",))
        self.bias = init.constant(0.0, (width,), ("embed",)) if config.bias else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        bias = None if self.bias is None else self.bias[...]
        return layer_normalize(x, self.gain[...], bias, eps=self.eps)


@in_float32
def layer_normalize(
    x: Float[Array, "*B D"], gain: Float[Array, " D"], bias: Float[Array, " D"] | None, *, eps: float
) -> Float[Array, "*B D"]:
    """(x - mean) / sqrt(var + eps) · gain + bias over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    y = centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps) * gain
    return y if bias is None else y + bias


class RMSNormConfig(NormConfig):
    """y = x / sqrt(mean(x²) + eps) · gain (Zhang & Sennrich 2019).

    Attributes:
        unit_offset: the gain is stored less 1, so that weight decay would draw it to 1 (Gemma Team 2024).
    """

    kind: Literal["rmsnorm"] = "rmsnorm"
    eps: Epsilon = 1e-6
    unit_offset: bool = False

    def build(self, model: ModelConfig, init: Initializer) -> RMSNorm:
        return RMSNorm(self, model.width, init)


class RMSNorm(nnx.Module):
    def __init__(self, config: RMSNormConfig, width: int, init: Initializer):
        self.eps, self.offset = config.eps, 1.0 if config.unit_offset else 0.0
        self.gain = init.constant(1.0 - self.offset, (width,), ("embed",))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return rms_normalize(x, self.gain[...].astype(jnp.float32) + self.offset, eps=self.eps)


@in_float32
def rms_normalize(x: Float[Array, "*B D"], gain: Float[Array, " D"], *, eps: float) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x²) + eps) · gain over the last axis."""
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * gain


class ScaleNormConfig(NormConfig):
    """y = gain · x / max(|x|, eps), one learned gain, at first sqrt(D) (Nguyen & Salazar 2019, eq. 5)."""

    kind: Literal["scalenorm"] = "scalenorm"
    eps: Epsilon = 1e-5

    def build(self, model: ModelConfig, init: Initializer) -> ScaleNorm:
        return ScaleNorm(self, model.width, init)


class ScaleNorm(nnx.Module):
    def __init__(self, config: ScaleNormConfig, width: int, init: Initializer):
        self.eps = config.eps
        self.gain = init.constant(width**0.5, (), ())

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return scale_normalize(x, self.gain[...], eps=self.eps)


@in_float32
def scale_normalize(x: Float[Array, "*B D"], gain: Float[Array, ""], *, eps: float) -> Float[Array, "*B D"]:
    """gain · x / max(|x|, eps) over the last axis."""
    # The maximum is taken under the root: sqrt has no gradient at 0.
    return x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), eps**2)) * gain


class NoNormConfig(NormConfig):
    """y = x."""

    kind: Literal["none"] = "none"

    def build(self, model: ModelConfig, init: Initializer) -> NoNorm:
        return NoNorm()


class NoNorm(nnx.Module):
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x


REGISTRY: dict[str, type[NormConfig]] = {
    "layernorm": LayerNormConfig,
    "rmsnorm": RMSNormConfig,
    "scalenorm": ScaleNormConfig,
    "none": NoNormConfig,
}
