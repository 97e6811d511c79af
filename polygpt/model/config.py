"""The configuration of a model: its shape and what fills each slot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from polygpt.config import Config, Tuple, merge, slot
from polygpt.kernels import LogitRule
from polygpt.model import attention, block, feedforward, norms, positions
from polygpt.model.block import BlockConfig
from polygpt.model.parts import AttentionConfig, FeedForwardConfig, InitScheme, NormConfig, PositionConfig, Scope
from polygpt.model.parts import architecture as architecture_of
from polygpt.sharding import MeshConfig

Dtype = Literal["float32", "bfloat16", "float16"]
Rate = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]

AttentionSlot = slot(AttentionConfig, attention.REGISTRY)
FeedForwardSlot = slot(FeedForwardConfig, feedforward.REGISTRY)
NormSlot = slot(NormConfig, norms.REGISTRY)
PositionSlot = slot(PositionConfig, positions.REGISTRY)
BlockSlot = slot(BlockConfig, block.REGISTRY)


class LayerConfig(Config):
    """What fills the slots of one layer; in `pattern`, None takes the model's own."""

    attention: AttentionSlot | None = None
    feedforward: FeedForwardSlot | None = None
    norm: NormSlot | None = None
    block: BlockSlot | None = None


class ModelConfig(Config):
    """A decoder, chosen part by part.

    Attributes:
        vocab_size: V; None means the tokenizer's, and is filled in when one is at hand.
        vocab_padding: this many ids at the end only round the vocabulary up to a size that is fast to multiply; they
            mean nothing and have probability 0.
        context_length: the longest sequence.
        embed_dim: D; None means V, which only `head: none` allows (the bigram model).
        num_layers: L.
        pattern: layers cycle through these entries: layer i takes entry i mod len. A part in an entry replaces the
            model's part if it names a kind; without a kind it changes fields of it.
        block: how attention, feed-forward and norms are arranged in a layer.
        final_norm: a norm before the head, of the model's own kind.
        head: `tied` to the embedding, `untied`, or `none` (the last hidden states are the logits).
        dropout: on the output of every attention and feed-forward.
        embed_dropout: on the embedding.
        embed_scale: what token embeddings are multiplied by; `sqrt` is sqrt(D) (Vaswani et al. 2017, 3.4; Gemma).
        logit_softcap: logits become cap · tanh(logits / cap) (Gemma Team 2024, section 2).
        init: `normal` (GPT-2's) or `fan_in` (truncated, variance 1/fan-in).
        init_std: standard deviation of `normal`.
        compute_dtype: of activations; norms' statistics, softmax, RoPE angles, logits and loss stay float32.
        param_dtype: of stored parameters. In 16 bits a gain near 1 moves in steps of 0.004 to 0.008 or not at all, so
            small learning rates may not change it.
        matmul_precision: of products in float32 on devices that have faster ones (TF32 or bfloat16 passes): `default`
            the fastest, `high`, or `highest`; None leaves JAX's own setting. A CPU has one precision.
        scan_layers: compile one repetition of the pattern and scan over it, so that compile time does not grow
            with depth; None means from 9 layers on, or 25 in training on one GPU (fewer layers compile quickly unrolled
            and run faster), and wherever activations are computed again (`training.remat`).
        layout: the mesh that the model is spread over where there are as many devices and the run names no other.
    """

    vocab_size: PositiveInt | None = None
    vocab_padding: NonNegativeInt = 0
    context_length: PositiveInt
    embed_dim: PositiveInt | None
    num_layers: Annotated[int, Field(ge=0)]
    position: PositionSlot
    norm: NormSlot
    attention: AttentionSlot | None = None
    feedforward: FeedForwardSlot | None = None
    block: BlockSlot = block.PreNormConfig()
    pattern: Tuple[LayerConfig] = (LayerConfig(),)
    final_norm: bool = True
    head: Literal["tied", "untied", "none"] = "tied"
    dropout: Annotated[Rate, Scope.TRAINING] = 0.0
    embed_dropout: Annotated[Rate, Scope.TRAINING] = 0.0
    embed_scale: Positive | Literal["sqrt"] = 1.0
    logit_softcap: Positive | None = None
    init: Annotated[InitScheme, Scope.TRAINING] = "normal"
    init_std: Annotated[float, Field(gt=0, le=1), Scope.TRAINING] = 0.02
    compute_dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    matmul_precision: Annotated[Literal["default", "high", "highest"] | None, Scope.EXECUTION] = None
    scan_layers: Annotated[bool | None, Scope.EXECUTION] = None
    layout: Annotated[MeshConfig | None, Scope.EXECUTION] = None

    @model_validator(mode="before")
    @classmethod
    def _merge_pattern_into_model(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("pattern"), (list, tuple)):
            return data
        return {**data, "pattern": [_complete(entry, data) for entry in data["pattern"]]}

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if not self.pattern:
            raise ValueError("pattern is empty; leave it out, or give at least one entry such as {}")
        if self.num_layers and len(self.pattern) > self.num_layers:
            raise ValueError(
                f"pattern has {len(self.pattern)} entries but num_layers={self.num_layers}: "
                "some entries would never be used"
            )
        if self.vocab_padding and (self.vocab_size is None or self.vocab_padding >= self.vocab_size):
            size = "open" if self.vocab_size is None else self.vocab_size
            raise ValueError(f"vocab_padding={self.vocab_padding} needs a larger vocab_size; it is {size}")
        if self.embed_dim is None and self.head != "none":
            raise ValueError("embed_dim is required unless head=none (then it is vocab_size)")
        known = self.embed_dim is not None and self.vocab_size is not None
        if self.head == "none" and known and self.embed_dim != self.vocab_size:
            raise ValueError(f"head=none needs embed_dim={self.embed_dim} equal to vocab_size={self.vocab_size}")
        for index, layer in enumerate(self.layers):
            if layer.attention is None or layer.feedforward is None:
                missing = "attention" if layer.attention is None else "feedforward"
                raise ValueError(f"{missing} is required: layer {index} has none")
        if self.embed_dim is not None or self.vocab_size is not None:
            self._check_parts()
        return self

    def _check_parts(self) -> None:
        for layer in self.layers[: len(self.pattern)]:
            for part in (layer.attention, layer.feedforward, layer.norm, layer.block):
                part.check(self)
        self.position.check(self)

    @property
    def width(self) -> int:
        """D, the width of the residual stream."""
        width = self.embed_dim or self.vocab_size
        if width is None:
            raise ValueError("embed_dim and vocab_size are both open; give vocab_size")
        return width

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """What fills each layer, the pattern resolved."""
        own = {"attention": self.attention, "feedforward": self.feedforward, "norm": self.norm, "block": self.block}
        entries = [
            LayerConfig.model_construct(**{name: getattr(entry, name) or part for name, part in own.items()})
            for entry in self.pattern
        ]
        return tuple(entries[i % len(entries)] for i in range(self.num_layers))

    @property
    def logit_rule(self) -> LogitRule:
        """How the head's products become logits."""
        return LogitRule(self.logit_softcap, self.vocab_padding)

    def architecture(self) -> dict[str, Any]:
        """What the model is: its plain fields without those that say how it is run or trained (`Scope`)."""
        return architecture_of(self)

    def with_vocab(self, size: int) -> ModelConfig:
        """The configuration with an open `vocab_size` filled in."""
        return self if self.vocab_size is not None else self.replace(vocab_size=size)


def _complete(entry: Any, model: Mapping[str, Any]) -> Any:
    """A pattern's entry in which parts without a kind have been merged into the model's own."""
    if not isinstance(entry, Mapping):
        return entry
    return {
        name: merge(_plain(model.get(name)), part) if isinstance(part, Mapping) and "kind" not in part else part
        for name, part in entry.items()
    }


def _plain(part: Any) -> Any:
    if isinstance(part, Config):
        return part.to_dict()
    return {"kind": part} if isinstance(part, str) else part or {}
