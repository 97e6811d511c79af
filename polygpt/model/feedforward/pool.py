"""The slots of a soft mixture of experts as running softmax-weighted means, to which tokens can be added."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from polygpt.model.parts import Context


class Pool(NamedTuple):
    """A softmax-weighted mean of tokens for each slot, as a running sum; float32.

    Attributes:
        largest: the largest logit so far; -inf if there is none.
        weight: Σ exp(logit - largest).
        total: Σ exp(logit - largest) · x.
    """

    largest: Float[Array, "B E S"]
    weight: Float[Array, "B E S"]
    total: Float[Array, "B E S D"]

    @classmethod
    def empty(cls, logits_shape: tuple[int, ...], width: int) -> Pool:
        batch, _, *slots = logits_shape
        zeros = jnp.zeros((batch, *slots))
        return cls(zeros - jnp.inf, zeros, jnp.zeros((batch, *slots, width)))

    @classmethod
    def of(cls, x: Float[Array, "B T D"], logits: Float[Array, "B T E S"], seen: Bool[Array, "B T"]) -> Pool:
        """The pool of the tokens that are `seen`."""
        logits = jnp.where(seen[:, :, None, None], logits, -jnp.inf)
        largest = lax.stop_gradient(logits.max(1))  # a shift that cancels out
        weights = jnp.exp(logits - _finite(largest)[:, None])
        return cls(largest, weights.sum(1), jnp.einsum("btes,btd->besd", weights, x.astype(jnp.float32)))

    def join(self, other: Pool) -> Pool:
        """The pool of both."""
        largest = jnp.maximum(self.largest, other.largest)
        mine, theirs = (jnp.exp(pool.largest - _finite(largest)) for pool in (self, other))
        total = self.total * mine[..., None] + other.total * theirs[..., None]
        return Pool(largest, self.weight * mine + other.weight * theirs, total)

    def where(self, kept: Bool[Array, " B"], otherwise: Pool) -> Pool:
        """This pool in rows that are `kept`, the other elsewhere."""
        return jax.tree.map(lambda a, b: jnp.where(kept.reshape(-1, *[1] * (a.ndim - 1)), a, b), self, otherwise)

    def mean(self, dtype: DTypeLike) -> Float[Array, "B E S D"]:
        """The slots; zeros if there is no token."""
        return (self.total / jnp.where(self.weight == 0, 1, self.weight)[..., None]).astype(dtype)


def _finite(largest: Float[Array, "..."]) -> Float[Array, "..."]:
    # Where nothing was seen, exp(-inf - 0) = 0; -inf - -inf would be NaN.
    return jnp.where(largest == -jnp.inf, 0, largest)


class Token(NamedTuple):
    """One token of each row, to be added to a pool."""

    x: Float[Array, "B D"]
    logits: Float[Array, "B E S"]
    opens: Bool[Array, " B"]  # the first token of a packed document, which does not see those before it
    valid: Bool[Array, " B"]
    position: Int[Array, " B"]

    @classmethod
    def sequence(cls, x: Float[Array, "B T D"], logits: Float[Array, "B T E S"], context: Context) -> Token:
        """All tokens, with T as the leading axis."""
        ones = jnp.ones(x.shape[:2], bool)
        ids = context.segment_ids
        opens = ~ones if ids is None else jnp.concatenate([~ones[:, :1], ids[:, 1:] != ids[:, :-1]], 1)
        valid = ones if context.valid is None else context.valid
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), cls(x, logits, opens, valid, context.positions))

    def enter(self, pool: Pool) -> Pool:
        """The pool with this token in it."""
        empty = Pool.empty((self.x.shape[0], 1, *self.logits.shape[1:]), self.x.shape[1])
        own = Pool.of(self.x[:, None], self.logits[:, None], jnp.ones_like(self.valid)[:, None])
        return empty.where(self.opens, pool).join(own).where(self.valid, pool)
