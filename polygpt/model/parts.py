"""What a part is: the interfaces of the slots, the declaration of parameters, and the context of one call.

A part is a frozen configuration with a `kind` and one method that matters, `build`, which makes its NNX module.
The configuration also states what the part costs and which model shapes it accepts, so that a mistake is found
before anything is compiled or allocated. Knows nothing of the parts that exist; each slot's registry lists those.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from polygpt.config import Config, PartConfig
from polygpt.kernels import dropout as dropout  # for parts of a user's own, too
from polygpt.kernels import matmuls
from polygpt.sharding import constrain

if TYPE_CHECKING:
    from polygpt.model.config import ModelConfig

InitScheme = Literal["normal", "fan_in"]


class Scope(Enum):
    """Marks a field of a configuration that does not say what a model is; `architecture` leaves such fields out."""

    EXECUTION = "how it is computed on a machine: any value gives the same numbers, up to rounding"
    TRAINING = "what happens in training alone: initial values, noise, auxiliary losses, dropped tokens"


def architecture(config: Config) -> dict[str, Any]:
    """The plain fields of `config`, and of the parts in it, without those marked with a `Scope`."""

    def plain(value: Any) -> Any:
        if isinstance(value, Config):
            return architecture(value)
        return [plain(entry) for entry in value] if isinstance(value, tuple) else value

    fields = type(config).model_fields.items()
    return {
        name: plain(getattr(config, name))
        for name, field in fields
        if not any(isinstance(mark, Scope) for mark in field.metadata)
    }


@dataclass(frozen=True)
class Initializer:
    """Declares the parameters of modules: shape, logical axes and distribution. `layers` stacks them for a scan.

    A module holds shapes, not numbers; `Model.init` draws the values, each parameter's from a generator of its own.

    `normal` is GPT-2's: N(0, `std`), with projections that write to the residual stream scaled by
    1/sqrt(2·layers of the model) (Radford et al. 2019, section 2.3). `fan_in` draws from a normal truncated at
    two deviations, with variance 1/fan-in.
    """

    scheme: InitScheme
    std: float
    residual_scale: float
    dtype: jnp.dtype
    layers: int | None = None

    def stacked(self, layers: int) -> Initializer:
        """The same initializer for modules that exist `layers` times, stacked along a leading axis."""
        return dataclasses.replace(self, layers=layers)

    def weight(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        inputs: int = 1,
        *,
        residual: bool = False,
        experts: bool = False,
        active: Fraction = Fraction(1),
    ) -> nnx.Param:
        """A matrix whose first `inputs` axes are contracted (0: a table that is looked up). Weight decay applies to it.

        Args:
            shape: without the `layers` axis.
            axes: the logical name of each axis.
            inputs: how many axes are contracted.
            residual: it writes to the residual stream.
            experts: the first axis counts matrices, one for each expert, and `inputs` begins after it.
            active: the share of it that one token uses.
        """
        own = shape[1:] if experts else shape
        fan_in = math.prod(own[:inputs]) if inputs else own[-1]
        full, axes = self._stack(shape, axes)
        # Truncating at ±2 shrinks the deviation to 0.8796; dividing restores it (as in Lecun's scheme).
        scale = self.std if self.scheme == "normal" else 1 / (math.sqrt(fan_in) * 0.87962566103423978)
        if residual:
            scale *= self.residual_scale
        stack = (self.layers is not None) + experts
        value = jax.ShapeDtypeStruct(full, self.dtype)
        return nnx.Param(value, axes=axes, inputs=inputs, stack=stack, active=active, deviation=scale)

    def constant(
        self,
        value: float,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        active: Fraction = Fraction(1),
        dtype: DTypeLike | None = None,
        trained: bool = True,
    ) -> nnx.Param:
        """A vector of equal values: a bias or a gain, which is not decayed.

        Args:
            value: every number of it.
            shape, axes, active: as for `weight`.
            dtype: if not that of all parameters.
            trained: whether a gradient moves it.
        """
        full, axes = self._stack(shape, axes)
        array = jax.ShapeDtypeStruct(full, dtype or self.dtype)
        return nnx.Param(array, axes=axes, active=active, mean=value, trained=trained)

    def _stack(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[str, ...]]:
        if len(shape) != len(axes):
            raise ValueError(f"a parameter of shape {shape} needs as many names of axes, not {axes}")
        if self.layers is None:
            return shape, axes
        return (self.layers, *shape), ("layers", *axes)


@dataclass(frozen=True)
class Context:
    """What every layer sees in one call beside the hidden states.

    Attributes:
        positions: int32 [B, T], the index of each token in its sequence or packed document.
        segment_ids: int32 [B, T] or None; each document of a packed sequence is a run of equal ids, and tokens of
            different documents do not see each other.
        valid: bool [B, T] or None (all): False for padding after a prompt, which must not enter a decoding state.
        rotations: for each head size, the RoPE table of `positions` (see `positions.py`); empty without RoPE.
        slopes: for a number of heads, the penalty per position that ALiBi subtracts from scores, float32 [N], or None.
        training: parts whose training form differs (capacity, noise, auxiliary losses) take that form.
        key: for dropout and noise; None draws nothing.
        fresh: the decoding state is still empty, so these tokens see only each other.
        loads: in training on a part of a batch, this feed-forward's loads over the whole batch, by name.
        capture: the intermediates that the caller asks for by name, each with a function that is applied to it.
        captured: of one layer, what its parts have recorded.
    """

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None = None
    valid: Bool[Array, "B T"] | None = None
    rotations: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    slopes: Callable[[int], Float[Array, " N"] | None] = lambda num_heads: None
    training: bool = False
    key: PRNGKeyArray | None = None
    fresh: bool = False
    loads: Mapping[str, Array] | None = None
    capture: Mapping[str, Callable[[Array], Array]] = dataclasses.field(default_factory=dict)
    captured: dict[str, Array] = dataclasses.field(default_factory=dict)

    def record(self, name: str, compute: Callable[[], Array]) -> None:
        """Records an intermediate if the caller asks for it; otherwise nothing is computed."""
        if name in self.capture:
            self.captured[name] = self.capture[name](compute())

    def fold(self, number: int | Int[Array, ""]) -> Context:
        """The same context with an independent dropout key."""
        if self.key is None:
            return self
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, number))


class Effects(NamedTuple):
    """What a layer reports in training beside its output; empty in evaluation.

    Attributes:
        losses: float32 scalars by name, weighted, to be added to the objective (summed over layers).
        metrics: float32 scalars by name, to be logged (averaged over layers).
        loads: means over the batch by name, from which the part's `updates` follow; of several batches their mean.
    """

    losses: dict[str, Float[Array, ""]]
    metrics: dict[str, Float[Array, ""]]
    loads: dict[str, Array]


NO_EFFECTS = Effects({}, {}, {})


def dense(x: Float[Array, "B T ..."], kernel: nnx.Param, bias: nnx.Param | None = None) -> Float[Array, "B T ..."]:
    """x·W + b, contracting the trailing axes of `x` with the first (`inputs`) axes of `kernel`."""
    return dense_each(x, (kernel, bias))[0]


def dense_each(
    x: Float[Array, "B T ..."], *projections: tuple[nnx.Param, nnx.Param | None]
) -> list[Float[Array, "B T ..."]]:
    """x·W + b of several kernels and biases that contract the same axes."""
    kernels = [kernel for kernel, _ in projections]
    found = []
    products = matmuls(x, [kernel.get_value() for kernel in kernels], kernels[0].get_metadata()["inputs"])
    for y, (kernel, bias) in zip(products, projections, strict=True):
        y = constrain(y, "batch", None, *kernel.get_metadata()["axes"][2 - y.ndim :])
        found.append(y if bias is None else y + bias[...].astype(x.dtype))
    return found


class AttentionModule(Protocol):
    """Mixes tokens causally: x [B, T, D] -> [B, T, D]; with a decoding state it also returns the next one."""

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, state: PyTree | None
    ) -> tuple[Float[Array, "B T D"], PyTree | None]: ...


class FeedForwardModule(Protocol):
    """Transforms tokens: x [B, T, D] -> [B, T, D]; also returns the next decoding state and its effects."""

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, state: PyTree | None
    ) -> tuple[Float[Array, "B T D"], PyTree | None, Effects]: ...


class ModelPart(PartConfig):
    """What fills a slot of the model. A subclass defines `build` and whatever else `needed` lists for its slot."""

    needed: ClassVar[tuple[str, ...]] = ("build",)

    def build(self, model: ModelConfig, init: Initializer) -> Any:
        """The NNX module, its parameters declared by `init`."""
        raise NotImplementedError

    def check(self, model: ModelConfig) -> None:
        """Raises ValueError if the part does not fit the model's shape, naming the two fields."""


class MixingPart(ModelPart):
    """A part that may mix tokens and then keeps a state while decoding."""

    def init_state(self, model: ModelConfig, batch: int, length: int) -> PyTree:
        """An empty decoding state for `batch` sequences of at most `length` tokens; None if none is needed."""
        return None

    def causal_in_training(self, model: ModelConfig) -> bool:
        """Whether no token's output depends on later tokens in training either. In evaluation none ever does."""
        return True

    def flops_per_token(self, model: ModelConfig) -> int:
        """Forward FLOPs a token beyond those of its weights (2 for each that is active), at full context length."""
        return 0


class AttentionConfig(MixingPart):
    """The slot `attention`: builds an `AttentionModule`."""

    needed = ("build", "init_state")

    def rotation_size(self, model: ModelConfig) -> int | None:
        """The head size that RoPE tables are needed for; None if the part does not rotate."""
        return None

    def implementation_name(self, model: ModelConfig) -> str:
        """The kernel that computes it in training on this machine, for the log."""
        return self.kind


class FeedForwardConfig(MixingPart):
    """The slot `feedforward`: builds a `FeedForwardModule`."""

    def loss_needs_loads(self) -> bool:
        """Whether its auxiliary losses depend on the loads of the whole batch, and not just on each token."""
        return False

    def updates(self, loads: dict[str, Array]) -> dict[str, Array]:
        """What to add, after a step, to parameters that no gradient reaches, by name; from `Effects.loads`."""
        return {}


class NormConfig(ModelPart):
    """The slot `norm`: builds a module that maps x [B, T, D] to [B, T, D]."""


class PositionConfig(ModelPart):
    """The slot `position`: adds to the embedding, rotates queries and keys, biases scores, or does nothing.

    Builds a module like `positions.NoPosition`.
    """

    # Whether there are positions beyond the context length, for generation.
    unbounded: ClassVar[bool] = False
