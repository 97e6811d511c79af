"""How the next token is chosen from logits: a frozen configuration with one method."""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
from pydantic import Field, PositiveInt

from polygpt.config import Config


class Sampler(Config):
    """Temperature, then top-k, then top-p, then min-p; temperature 0 is greedy and ignores the rest.

    Attributes:
        temperature: logits are divided by it.
        top_k: only the k likeliest tokens stay.
        top_p: only the smallest set of likeliest tokens whose probability reaches p stays (Holtzman et al. 2020).
        min_p: only tokens at least p times as likely as the likeliest stay (Nguyen et al. 2024).
    """

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: PositiveInt | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def sample(self, logits: Float[Array, "B V"], key: PRNGKeyArray) -> Int[Array, "B"]:
        """One token a row, int32."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
        return jax.vmap(jax.random.categorical)(keys, self.filter(logits)).astype(jnp.int32)

    def filter(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Scaled logits with every token that may not be chosen at -inf."""
        logits = logits.astype(jnp.float32) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kth = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits < kth, -jnp.inf, logits)
        if self.top_p < 1:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
            # A token stays while the probability before it is below p: the likeliest always does.
            last = jnp.where(before < self.top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
            logits = jnp.where(logits < last, -jnp.inf, logits)
        if self.min_p > 0:
            floor = logits.max(axis=-1, keepdims=True) + jnp.log(self.min_p)
            logits = jnp.where(logits < floor, -jnp.inf, logits)
        return logits
