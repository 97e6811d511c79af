"""The decoder: embedding, a stack of blocks, a final norm, a head. Every model is one of these, configured.

Blocks of one pattern entry are stored stacked along a leading `layers` axis, whether they are then scanned over or
unrolled, so that a checkpoint does not depend on how it is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from polygpt.kernels import (
    dropout,
    in_stack,
    layer_view,
    max_unrolled_layers,
    nll_of_logits,
    project_to_vocabulary,
    token_nll,
    weighted_nll,
    write_back,
)
from polygpt.model.block import LayerState
from polygpt.model.config import ModelConfig
from polygpt.model.parts import Context, Effects, Initializer
from polygpt.model.remat import Remat, rematerialized, scan_in_segments
from polygpt.sharding import constrain, current_mesh, gathered

Loads = dict[int, dict[str, Array]]
# Intermediates by name, each with a function that is applied to it before it is kept.
Capture = Mapping[str, Callable[[Array], Array]]


class Output(NamedTuple):
    """What one call gives.

    Attributes:
        hidden: [B, T, D], ready for the head.
        state: the decoding state after these tokens; None if none was given.
        effects: of training: losses summed and metrics averaged over layers; `loads` by the index of the pattern's
            entry, those of the layers that it serves stacked.
        captured: for each layer, the intermediates that were asked for.
    """

    hidden: Float[Array, "B T D"]
    state: PyTree | None
    effects: Effects
    captured: tuple[dict[str, Array], ...] = ()


def _at_precision(method: Callable) -> Callable:
    """A method of the decoder, its products at `matmul_precision`."""

    @functools.wraps(method)
    def call(self: Decoder, *args: Any, **kwargs: Any) -> Any:
        with matmul_precision(self.config):
            return method(self, *args, **kwargs)

    return call


def matmul_precision(config: ModelConfig) -> AbstractContextManager:
    """A context in which products are traced at `model.matmul_precision`; gradients are to be taken in it, too."""
    precision = config.matmul_precision
    return contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision)


class Decoder(nnx.Module):
    """tokens [B, T] -> hidden states [B, T, D] -> logits [B, T, V]."""

    def __init__(self, config: ModelConfig):
        init = Initializer(
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
            layer.block.build(layer, config, init.stacked(len(config.layers[entry::period])))
            for entry, layer in enumerate(config.layers[:period])
        )
        self.final_norm = config.norm.build(config, init) if config.final_norm else None
        self.head = init.weight((width, vocab), ("embed", "vocab")) if config.head == "untied" else None

    @_at_precision
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        valid: Bool[Array, "B T"] | None = None,
        state: PyTree | None = None,
        fresh: bool = False,
        training: bool = False,
        key: PRNGKeyArray | None = None,
        loads: Loads | None = None,
        remat: Remat = "none",
        capture: Capture | None = None,
        for_state: bool = False,
    ) -> Output:
        """Hidden states of `tokens`.

        Args:
            tokens: int32 [B, T].
            positions: int32 [B, T], consecutive in each document; 0, 1, 2, ... by default. With a state they continue
                where it ends, and a sequence starts at 0.
            segment_ids: int32 [B, T]; each document is a run of equal ids, and sees only itself.
            valid: bool [B, T]; False for padding at the end of a row, which enters no decoding state.
            state: a decoding state (`Model.init_state`): tokens then also see what came before them.
            fresh: the state is still empty, so these tokens may be computed as a sequence of their own.
            training: take the training form of parts that have one (capacity, noise, auxiliary losses).
            key: for dropout and noise; None draws nothing.
            loads: those of `Output.effects` over the whole batch, of which these tokens are a part.
            remat: what is computed again for the gradient (see `remat.py`).
            capture: the intermediates to give back, each with a function that is applied to it, such as one that
                keeps a part of it. There are `residual`, the residual stream after each block, [B, T, D];
                `attention`, each head's weights, float32 [B, N, T, S]; and `experts`, the share that each expert has
                in a token's output, float32 [B, T, E], of feed-forwards with experts.
            for_state: only the state will be used, so the last layer's attention and feed-forward are compiled away.

        Raises:
            ValueError: `segment_ids` and `state` are both given: a decoding state holds one document.
        """
        if segment_ids is not None and state is not None:
            raise ValueError("segment_ids cannot be combined with a decoding state, which holds one document")
        counted = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segment_ids is not None:
            segment_ids, counted = _documents(segment_ids)
        positions = counted if positions is None else positions
        position = _gathered(self.position)
        sizes = {layer.attention.rotation_size(self.config) for layer in self.config.layers} - {None}
        context = Context(
            positions=positions,
            segment_ids=segment_ids,
            valid=valid,
            rotations=position.rotations(positions, sizes),
            slopes=position.slopes,
            training=training,
            key=key,
            fresh=fresh,
            capture=capture or {},
        )
        x = self._embed(tokens, position, context)
        x, state, effects, captured = self._layers(x, context, state, loads or {}, remat, for_state)
        return Output(self.normalize(x), state, effects, captured)

    def normalize(self, residual: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The residual stream after the final norm, ready for the head."""
        final_norm = _gathered(self.final_norm)
        return residual if final_norm is None else final_norm(residual)

    def _embed(self, tokens: Int[Array, "B T"], position: nnx.Module, context: Context) -> Float[Array, "B T D"]:
        """scale · E[token], plus what the position adds, after dropout."""
        config = self.config
        table = self.embedding if current_mesh() is None else _whole(self.embedding)
        x = constrain(table[tokens], "batch", None, "embed").astype(config.compute_dtype)
        scale = config.width**0.5 if config.embed_scale == "sqrt" else config.embed_scale
        x = x if scale == 1 else x * jnp.asarray(scale, x.dtype)
        x = position.embed(x, context.positions)
        if context.valid is not None:  # products leave out rows of zeros (kernels/native)
            x = jnp.where(context.valid[..., None], x, 0)
        return dropout(x, config.embed_dropout, context.fold(config.num_layers).key)

    def _layers(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        state: PyTree | None,
        loads: Loads,
        remat: Remat,
        for_state: bool,
    ) -> tuple[Float[Array, "B T D"], PyTree | None, Effects, tuple[dict[str, Array], ...]]:
        """All layers: a scan over whole repetitions of the pattern, if there are several, then the rest of one."""
        graphs, params, in_place = _split(self.blocks)
        whole, rest = divmod(self.config.num_layers, max(len(graphs), 1))
        # XLA merges what is computed again with what was computed before, unless a scan separates them: eight layers
        # unrolled took 2.6 GB with remat=block, and 0.4 scanned.
        unrolls = remat == "none" and self.config.num_layers <= max_unrolled_layers(context.training)
        scans = not unrolls if self.config.scan_layers is None else self.config.scan_layers
        last_apart = for_state and scans and whole > 1 and not rest  # nothing is left out of a scan's last round
        if last_apart:
            whole, rest = whole - 1, len(graphs)

        def run(
            entry: int, leaves: dict, x: Array, index: Array | int, before: LayerState
        ) -> tuple[Array, LayerState, tuple[Effects, dict[str, Array]]]:
            layer = _gathered(nnx.merge(graphs[entry], unflatten_dict(leaves)))
            whole_batch = jax.tree.map(lambda leaf: leaf[index], loads.get(entry))
            own = dataclasses.replace(context.fold(index * len(graphs) + entry), loads=whole_batch, captured={})
            y, after, effects = layer(x, own, before)
            own.record("residual", lambda: y)
            return y, after, (effects, own.captured)

        run = rematerialized(run, remat)

        def repetition(
            carry: tuple[Array, list], inputs: tuple[Array | int, list]
        ) -> tuple[tuple[Array, list], list[tuple[Effects, dict[str, Array]]]]:
            (x, states), (index, weights) = carry, inputs
            states, reports = list(states), []
            for entry, leaves in enumerate(weights):
                leaves = leaves | layer_view(in_place[entry], index)
                x, after, reported = run(entry, leaves, x, index, layer_view(states[entry], index))
                states[entry] = write_back(states[entry], after, index)
                reports.append(reported)
            return (x, states), reports

        def alone(carry: tuple[Array, list], index: int, entries: int) -> tuple[tuple[Array, list], list[tuple]]:
            """Repetition `index`, or its first entries, outside a scan."""
            weights = jax.tree.map(lambda leaf: leaf[index], params[:entries])
            carry, reports = repetition(carry, (index, weights))
            return carry, jax.tree.map(lambda leaf: leaf[None], reports)

        carry = (x, [LayerState(None, None)] * len(graphs) if state is None else state)
        # Fully unrolled if that runs faster; the gradient of the stack is still one concatenation.
        unroll = 1 if scans else max(whole, 1)
        if whole == 1:  # a scan of one repetition takes half as long again to trace and differentiate
            carry, reports = alone(carry, 0, len(graphs))
        elif state is not None:  # decoding: no gradient is taken, and slices of the stacks would be copies

            def indexed(carry: tuple[Array, list], index: Array) -> tuple[tuple[Array, list], list[tuple]]:
                return repetition(carry, (index, layer_view(params, index)))

            carry, reports = lax.scan(indexed, carry, jnp.arange(whole), unroll=unroll)
        else:
            head = jax.tree.map(lambda leaf: leaf[:whole], params)
            scan = scan_in_segments if remat == "full" else lax.scan
            carry, reports = scan(repetition, carry, (jnp.arange(whole), head), unroll=unroll)
        if rest:
            carry, last = alone(carry, whole, rest)
            reports[:rest] = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), reports[:rest], last)
        x, after = carry
        effects, captured = [report[0] for report in reports], [report[1] for report in reports]
        layers = _by_layer(captured, self.config.num_layers) if context.capture else ()
        return x, None if state is None else after, _over_layers(effects), layers

    @_at_precision
    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """float32 logits of hidden states."""
        if self.config.head == "none":
            products = hidden.astype(jnp.float32)
        elif self.config.head == "tied":
            products = project_to_vocabulary(hidden, _whole(self.embedding), transposed=True)
        else:
            products = project_to_vocabulary(hidden, _whole(self.head))
        products = constrain(products, "batch", *[None] * (hidden.ndim - 2), "vocab")
        return self.config.logit_rule.apply(products)

    def nll(self, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
        """Negative log likelihood of each target in nats, float32."""
        if current_mesh() is None or self.config.head == "none":
            return nll_of_logits(self.logits(hidden), targets)
        return token_nll(hidden, self._head_matrix(), targets, self.config.logit_rule)

    def _head_matrix(self) -> Float[Array, "D V"]:
        return _whole(self.embedding).T if self.config.head == "tied" else _whole(self.head)

    @_at_precision
    def loss(
        self, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], token_weights: Float[Array, "B T"]
    ) -> Float[Array, ""]:
        """Σ token_weights · nll, equal to that of `nll`, in a form that is fast to differentiate."""
        if self.config.head == "none":
            return (self.nll(hidden, targets) * token_weights).sum()
        return weighted_nll(hidden, self._head_matrix(), targets, token_weights, self.config.logit_rule)


def _whole(parameter: nnx.Param) -> Any:
    """A parameter's value as products need it (see `gathered`)."""
    value = parameter.get_value()
    if current_mesh() is None:
        return value
    axes = parameter.get_metadata()["axes"]
    return gathered(value, axes[len(axes) - value.ndim :])  # within a layer there is no axis `layers`


def _gathered(module: nnx.Module | None) -> nnx.Module | None:
    """A module whose parameters are as products need them; the module itself where no mesh is in scope."""
    if module is None or current_mesh() is None:
        return module
    graph, state = nnx.split(module)
    whole = {path: _whole(parameter) for path, parameter in nnx.to_flat_state(state)}
    return nnx.merge(graph, unflatten_dict(whole))


def _documents(segment_ids: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The number of each token's document, and its position in it. An id that returns later is another document."""
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    return jnp.cumsum(starts, axis=1), index - lax.cummax(jnp.where(starts, index, 0), axis=1)


def _split(blocks: nnx.List) -> tuple[list[nnx.GraphDef], list[dict], list[dict]]:
    """Each pattern entry's structure, its stacked parameters by path, and those of them that are read in place."""
    graphs, params, in_place = [], [], []
    for block in blocks:
        graph, leaves = nnx.split(block)
        flat = flatten_dict(nnx.to_pure_dict(leaves))
        graphs.append(graph)
        params.append({path: leaf for path, leaf in flat.items() if not in_stack(leaf)})
        in_place.append({path: leaf for path, leaf in flat.items() if in_stack(leaf)})
    return graphs, params, in_place


def _by_layer(captured: list[dict[str, Array]], num_layers: int) -> tuple[dict[str, Array], ...]:
    """What each layer recorded, from what those of each pattern entry did, stacked."""
    period = len(captured)
    return tuple(
        {name: stack[layer // period] for name, stack in captured[layer % period].items()}
        for layer in range(num_layers)
    )


def _over_layers(effects: list[Effects]) -> Effects:
    """The effects of all layers, from those of each pattern entry with the layers that it serves stacked."""
    losses: dict[str, Array] = {}
    metrics: dict[str, list[Array]] = {}
    for entry in effects:
        for name, values in entry.losses.items():
            losses[name] = losses.get(name, 0.0) + values.sum()
        for name, values in entry.metrics.items():
            metrics.setdefault(name, []).append(values)
    means = {name: jnp.concatenate(values).mean() for name, values in metrics.items()}
    return Effects(losses, means, {i: entry.loads for i, entry in enumerate(effects) if entry.loads})
