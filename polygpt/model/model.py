"""A configured decoder as pure functions of arrays: what everything outside this package works with.

The NNX module is split once, here; parameters travel as nested dictionaries of arrays and every function below can
be compiled, differentiated and sharded directly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from polygpt.errors import RequestError
from polygpt.kernels import WeightType, pack
from polygpt.model.block import LayerState
from polygpt.model.config import ModelConfig
from polygpt.model.decoder import Decoder, Loads, Output
from polygpt.model.initial import draw_on_mesh, draw_parameters
from polygpt.model.parts import Effects
from polygpt.model.remat import Remat

Params = dict[str, Any]


@dataclass(frozen=True)
class ParameterInfo:
    """What is known about a parameter without its values.

    Attributes:
        shape: with a leading `layers` axis for parameters of blocks.
        dtype: as stored.
        axes: the logical name of each axis.
        inputs: how many axes after the stacked ones are contracted; 0 for a table that is looked up, None for a vector
            (a bias or gain), which weight decay leaves alone.
        stack: how many leading axes count matrices: layers, experts.
        active: the share of it that one token uses.
        mean, deviation: of its initial values; a deviation of 0 leaves them all equal.
        trained: whether a gradient moves it; a balance bias follows the experts' loads instead.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str, ...]
    inputs: int | None = None
    stack: int = 0
    active: Fraction = Fraction(1)
    mean: float = 0.0
    deviation: float = 0.0
    trained: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of one matrix that are contracted, and those that remain (all, for a table)."""
        first = self.stack + (self.inputs or 0)
        return self.shape[self.stack : first], self.shape[first:]


def _info(path: tuple, variable: nnx.Variable) -> ParameterInfo:
    metadata = variable.get_metadata()
    if "axes" not in metadata:
        name = ".".join(map(str, path))
        raise RequestError(f"parameter {name} has no logical axes: make it by init.weight or init.constant")
    names = ("axes", "inputs", "stack", "active", "mean", "deviation", "trained")
    declared = {name: metadata[name] for name in names if name in metadata}
    return ParameterInfo(tuple(variable.shape), jnp.dtype(variable.dtype), **declared)


class Model:
    """The pure functions and the static facts of one configuration; holds no parameters.

    Raises:
        RequestError: the configuration leaves `vocab_size` open.
    """

    def __init__(self, config: ModelConfig):
        if config.vocab_size is None:
            raise RequestError("model.vocab_size is open (it is the tokenizer's); give model.vocab_size=N")
        self.config = config

    @cached_property
    def _abstract(self) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(Decoder(self.config))

    def module(self, params: Params) -> Decoder:
        """The NNX module that holds `params`; inside a compiled function this costs nothing at run time."""
        return nnx.merge(self._abstract[0], params)

    def check(self) -> None:
        """Traces a model with parts of a user's own, before anything is compiled or allocated.

        Raises:
            RequestError: a part does not do what its slot asks of it; its kind and the reason are named.
        """
        parts = {part for layer in self.config.layers for _, part in layer} | {self.config.position, self.config.norm}
        own = sorted(part.kind for part in parts if ":" in part.kind)
        if not own:
            return
        tokens = jax.ShapeDtypeStruct((3, min(4, self.config.context_length)), jnp.int32)
        weights = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
        try:
            params = jax.tree.map(lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype), self.parameters)
            jax.eval_shape(self.loss, params, tokens, tokens, weights)
            state = jax.eval_shape(lambda: self.init_state(*tokens.shape))
            jax.eval_shape(lambda p, t, s: self.hidden(p, t, state=s), params, tokens, state)
        except (TypeError, ValueError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RequestError(
                f"{' or '.join(own)} does not fit its slot (see docs/add-a-part.md): {reason}"
            ) from error

    def pack(self, params: Params, dtype: WeightType) -> Params:
        """`params` in the form that inference reads fastest, for every function below that takes no gradient.

        Matrices that multiply activations are packed, and the embedding; experts, which are chosen by token, and
        vectors are not. `params` is left unchanged: drop it, or both are kept in memory.
        """
        infos = flatten_dict(self.parameters)
        flat = flatten_dict(params).items()
        return unflatten_dict(
            {path: pack(leaf, *infos[path].sides, dtype) if path in self.packable else leaf for path, leaf in flat}
        )

    @cached_property
    def packable(self) -> frozenset[tuple]:
        """The paths of the parameters that `pack` packs."""
        infos = flatten_dict(self.parameters)
        matrices = {path for path, info in infos.items() if info.inputs and "expert" not in info.axes}
        return frozenset(matrices | {("embedding",)})

    # --- Pure functions -------------------------------------------------------------------------------------

    def init(self, seed: int | PRNGKeyArray, shardings: PyTree | None = None) -> Params:
        """Freshly drawn parameters: those of one path depend on the seed, the path and the shape alone.

        (But for one factor: `init: normal` scales projections to the residual stream by the number of layers.)

        Args:
            seed: or a key.
            shardings: where each parameter goes, if not to the default device; it is drawn there. On a mesh every
                device draws what it holds.
        """
        key = jax.random.key(seed) if isinstance(seed, int) else seed
        if shardings is not None and jax.tree.leaves(shardings)[0].mesh.size > 1:
            return draw_on_mesh(key, self.parameters, shardings, truncated=self.config.init == "fan_in")
        draw = partial(draw_parameters, infos=self.parameters, truncated=self.config.init == "fan_in")
        return jax.jit(draw, out_shardings=shardings)(key)

    def hidden(self, params: Params, tokens: Int[Array, "B T"], **inputs: Any) -> Output:
        """Hidden states; keyword arguments are those of `Decoder.__call__`."""
        return self.module(params)(tokens, **inputs)

    def logits(self, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """float32 logits of the token after each position."""
        decoder = self.module(params)
        return decoder.logits(decoder(tokens).hidden)

    def nll(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T"]:
        """Negative log likelihood of each target in nats, float32; nothing is dropped and every part is causal."""
        decoder = self.module(params)
        return decoder.nll(decoder(tokens, segment_ids=segment_ids).hidden, targets)

    def loss(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        token_weights: Float[Array, "B T"],
        key: PRNGKeyArray | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        loads: Loads | None = None,
        remat: Remat = "none",
    ) -> tuple[Float[Array, ""], Effects]:
        """Σ token_weights · nll in training form, and what the parts report beside it.

        Args:
            key: for dropout and noise; None draws nothing.
            segment_ids: each document of a packed row is a run of equal ids, and sees itself alone.
            loads: the parts' loads over the whole batch, of which these tokens are a part.
            remat: what is computed again for the gradient (see `remat.py`).
        """
        decoder = self.module(params)
        output = decoder(tokens, segment_ids=segment_ids, training=True, key=key, loads=loads, remat=remat)
        return decoder.loss(output.hidden, targets, token_weights), output.effects

    def with_updates(self, params: Params, loads: dict[int, dict[str, Array]]) -> Params:
        """`params` after the updates that feed-forwards compute from their `loads` (those of `Effects`)."""
        blocks = dict(params.get("blocks", {}))
        for entry, own_loads in loads.items():
            own = blocks[entry]["feedforward"]
            changes = self.config.layers[entry].feedforward.updates(own_loads)
            moved = {name: own[name] + change.astype(own[name].dtype) for name, change in changes.items()}
            blocks[entry] = {**blocks[entry], "feedforward": {**own, **moved}}
        return {**params, "blocks": blocks} if loads else params

    def init_state(self, batch: int, length: int) -> PyTree:
        """An empty decoding state for `batch` sequences of at most `length` tokens."""
        period = len(self.config.pattern)
        states = []
        for entry, layer in enumerate(self.config.layers[:period]):
            parts = (layer.attention, layer.feedforward)
            state = LayerState(*(part.init_state(self.config, batch, length) for part in parts))
            count = len(self.config.layers[entry::period])
            states.append(jax.tree.map(lambda leaf, n=count: jnp.broadcast_to(leaf, (n, *leaf.shape)), state))
        return states

    def attention_implementation(self) -> str:
        """The attention kernels of training on this machine, for the log; several if layers differ."""
        names = {layer.attention.implementation_name(self.config) for layer in self.config.layers}
        return " + ".join(sorted(names)) or "none"

    # --- Facts, computed from shapes without allocating -----------------------------------------------------

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """A `ParameterInfo` in the place of every parameter."""
        return unflatten_dict({path: _info(path, leaf) for path, leaf in nnx.to_flat_state(self._abstract[1])})

    @cached_property
    def num_parameters(self) -> int:
        return sum(info.size for info in jax.tree.leaves(self.parameters))

    @cached_property
    def num_active_parameters(self) -> int:
        """Parameters that take part in computing one token."""
        return sum(int(info.size * info.active) for info in jax.tree.leaves(self.parameters))

    @cached_property
    def num_non_embedding_parameters(self) -> int:
        """Parameters without the tables of tokens and positions, which are looked up (Kaplan et al. 2020's N)."""
        return sum(info.size for info in jax.tree.leaves(self.parameters) if info.inputs != 0)

    def training_bytes(self, init_optimizer: Callable[[Params], PyTree] | None = None) -> dict[str, int]:
        """Bytes of the parameters, their gradients and the optimizer's state; of Adam's two moments by default."""
        init_optimizer = init_optimizer or (lambda params: (params, params))
        params = jax.tree.map(lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype), self.parameters)
        state = jax.eval_shape(init_optimizer, params)
        own, held = (sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) for tree in (params, state))
        return {"parameters": own, "gradients": own, "optimizer_state": held}

    def state_bytes(self, length: int) -> int:
        """Bytes of the decoding state of one sequence of `length` tokens, over all layers."""
        shapes = jax.eval_shape(lambda: self.init_state(1, length))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    @cached_property
    def state_bytes_per_token(self) -> int:
        """Bytes of decoding state (KV cache) that one more token adds at full context; 0 if the state is fixed."""
        context = self.config.context_length
        return self.state_bytes(context) - self.state_bytes(context - 1) if context > 1 else self.state_bytes(1)

    @cached_property
    def longest_sequence(self) -> int:
        """How long a generated sequence may become: the context length, or 2^31 - 1 tokens.

        The latter if every layer keeps a state of fixed size (a window, a recurrence) and there are positions for it.
        """
        bounded = not self.config.position.unbounded or self.state_bytes_per_token > 0
        return self.config.context_length if bounded else 2**31 - 1

    @cached_property
    def training_caveat(self) -> str | None:
        """What to know about the training loss if a part's training form is not causal; None if all are."""
        parts = {(name, getattr(layer, name)) for layer in self.config.layers for name in ("attention", "feedforward")}
        late = sorted({f"{name} {part.kind}" for name, part in parts if not part.causal_in_training(self.config)})
        if not late:
            return None
        return (
            f"in training, {' and '.join(late)} lets a token's output depend on later tokens, so the training loss is "
            "not that of a language model; evaluation and generation are causal"
        )

    @cached_property
    def flops_per_token(self) -> int:
        """FLOPs of training on one token at full context: three times the forward pass's products.

        2 FLOPs for each active weight that multiplies, a tied head's included, plus what parts add (Chowdhery et
        al. 2022, appendix B). Looked-up tables, norms and activations are not counted.
        """
        weights = sum(int(info.size * info.active) for info in jax.tree.leaves(self.parameters) if info.inputs)
        if self.config.head == "tied":
            weights += self.config.vocab_size * self.config.width
        parts = [part for layer in self.config.layers for part in (layer.attention, layer.feedforward)]
        return 3 * (2 * weights + sum(part.flops_per_token(self.config) for part in parts))


@lru_cache(maxsize=64)
def model_of(config: ModelConfig) -> Model:
    """The model of a configuration, made once: its facts and compiled functions are then shared by all who ask.

    Raises:
        RequestError: the configuration leaves `vocab_size` open.
    """
    return Model(config)
