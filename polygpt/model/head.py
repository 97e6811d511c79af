"""From hidden states to logits and to the likelihood of the next token, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def project_to_vocabulary(hidden: Float[Array, "... D"], weight: Float[Array, "D V"]) -> Float[Array, "... V"]:
    """float32 logits; the product is taken in the compute dtype and accumulated in float32, over flat tokens."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = jnp.matmul(flat, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return logits.reshape(*hidden.shape[:-1], weight.shape[-1])


def nll_of_logits(logits: Float[Array, "... V"], targets: Int[Array, "..."]) -> Float[Array, "..."]:
    """-log softmax(logits)[target], float32 nats."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def next_token_nll(
    hidden: Float[Array, "B T D"], weight: Float[Array, "D V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Negative log likelihood of each target in nats, float32."""
    return nll_of_logits(project_to_vocabulary(hidden, weight), targets)
