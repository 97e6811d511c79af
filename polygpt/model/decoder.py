"""The decoder: embedding, a stack of blocks, a final norm, a head. Every model is one of these, configured.

Blocks of one pattern entry are stored stacked along a leading `layers` axis, whether they are then scanned over or
unrolled, so that a checkpoint does not depend on how it is run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from polygpt.model.block import Block
from polygpt.model.config import ModelConfig
from polygpt.model.head import next_token_nll, nll_of_logits, project_to_vocabulary, weighted_nll
from polygpt.model.parts import Context, Draws, Initializer, dropout


class Output(NamedTuple):
    """What one call gives.

    Attributes:
        hidden: [B, T, D] after the final norm.
        state: the decoding state after these tokens; None where none was given.
        losses: the auxiliary losses that parts declare, summed over layers, float32 scalars by name.
    """

    hidden: Float[Array, "B T D"]
    state: PyTree | None
    losses: dict[str, Float[Array, ""]]


class Decoder(nnx.Module):
    """tokens [B, T] -> hidden states [B, T, D] -> logits [B, T, V]."""

    def __init__(self, config: ModelConfig, draws: Draws):
        init = Initializer(
            draws=draws,
            scheme=config.init,
            std=config.init_std,
            residual_scale=(2 * max(config.num_layers, 1)) ** -0.5 if config.init == "normal" else 1.0,
            dtype=jnp.dtype(config.param_dtype),
        )
        vocab, width = config.vocab_size, config.width
        self.config = config
        self.embedding = init.weight((vocab, width), ("vocab", "embed"), inputs=0)
        self.position = config.position.build(config, init)
        # Entry e of the pattern serves layers e, e + P, e + 2P, ...
        period = len(config.pattern)
        self.blocks = nnx.List(
            Block(layer, config, init.stacked(len(config.layers[entry::period])))
            for entry, layer in enumerate(config.layers[:period])
        )
        self.final_norm = config.norm.build(config, init)
        self.head = init.weight((width, vocab), ("embed", "vocab")) if config.head == "untied" else None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: PyTree | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Output:
        """Hidden states of `tokens`.

        Args:
            tokens: int32 [B, T].
            positions: int32 [B, T]; 0, 1, 2, ... by default.
            segment_ids: int32 [B, T]; tokens of different segments do not see each other.
            state: a decoding state (`init_state`): tokens then see what came before them, too.
            key: for dropout; None (evaluation, generation) drops nothing.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        sizes = {layer.attention.rotation_size(self.config) for layer in self.config.layers} - {None}
        rotations = self.position.rotations(positions, sizes)
        context = Context(positions, segment_ids, rotations, key)
        x = self.embedding[...][tokens].astype(self.config.compute_dtype)
        x = dropout(
            self.position.embed(x, positions), self.config.embed_dropout, context.fold(self.config.num_layers).key
        )
        x, state, losses = self._layers(x, context, state)
        return Output(self.final_norm(x), state, losses)

    def _layers(
        self, x: Float[Array, "B T D"], context: Context, state: PyTree | None
    ) -> tuple[Float[Array, "B T D"], PyTree | None, dict[str, Float[Array, ""]]]:
        """All layers: a scan over whole repetitions of the pattern, then the rest of one."""
        graphs, params = _split(self.blocks)
        whole, rest = divmod(self.config.num_layers, max(len(graphs), 1))

        def repetition(x: Array, inputs: tuple[Array | int, list, list]) -> tuple[Array, tuple[list, dict]]:
            index, weights, states = inputs
            after, totals = [], {}
            for entry, (leaves, before) in enumerate(zip(weights, states, strict=True)):
                layer = index * len(graphs) + entry
                x, new, losses = nnx.merge(graphs[entry], leaves)(x, context.fold(layer), before)
                after.append(new)
                totals = {name: totals.get(name, 0.0) + loss for name, loss in losses.items()}
            return x, (after, totals)

        states = [None] * len(graphs) if state is None else state
        head = jax.tree.map(lambda leaf: leaf[:whole], (params, states))
        # Fully unrolled where that is faster to run; the gradient of the stack stays one concatenation.
        x, (after, totals) = lax.scan(
            repetition, x, (jnp.arange(whole), *head), unroll=1 if self.config.scans else max(whole, 1)
        )
        losses = {name: values.sum() for name, values in totals.items()}
        if rest:
            tail = jax.tree.map(lambda leaf: leaf[whole], (params[:rest], states[:rest]))
            x, (last, totals) = repetition(x, (whole, *tail))
            after[:rest] = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), after[:rest], last)
            losses = {name: losses.get(name, 0.0) + value for name, value in totals.items()}
        return x, None if state is None else after, losses

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """float32 logits of hidden states."""
        if self.config.head == "none":
            return hidden.astype(jnp.float32)
        return project_to_vocabulary(hidden, self.head_weight)

    @property
    def head_weight(self) -> Float[Array, "D V"]:
        """The matrix of the head: its own, or the embedding's transpose."""
        return self.embedding[...].T if self.head is None else self.head[...]

    def nll(self, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
        """Negative log likelihood of each target in nats, float32."""
        if self.config.head == "none":
            return nll_of_logits(hidden, targets)
        return next_token_nll(hidden, self.head_weight, targets)

    def loss(
        self, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], token_weights: Float[Array, "B T"]
    ) -> Float[Array, ""]:
        """Σ token_weights · nll, as `nll` would give it, in the form that is fast to differentiate."""
        if self.config.head == "none":
            return (nll_of_logits(hidden, targets) * token_weights).sum()
        return weighted_nll(hidden, self.head_weight, targets, token_weights)


def _split(blocks: nnx.List) -> tuple[list[nnx.GraphDef], list[dict[str, Any]]]:
    """Each pattern entry's structure and its parameters, stacked over the layers it serves."""
    graphs, params = [], []
    for block in blocks:
        graph, leaves = nnx.split(block)
        graphs.append(graph)
        params.append(nnx.to_pure_dict(leaves))
    return graphs, params
