"""A model as a tree: which part is in each slot of which layers, and every parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from polygpt.config import PartConfig
from polygpt.model import LayerConfig, Model, ParameterInfo


@dataclass(frozen=True)
class Node:
    """A part, or a parameter.

    Attributes:
        name: `attention`, `query`, or the layers that a pattern entry is for.
        note: for a part, its kind and the settings that differ from their defaults.
        info: for a parameter, its shape (with a leading `layers` axis in blocks) and logical axes.
        children: the parts and parameters in it.
    """

    name: str
    note: str = ""
    info: ParameterInfo | None = None
    children: tuple[Node, ...] = ()

    @property
    def size(self) -> int:
        """The number of parameters in it and below it."""
        return self.info.size if self.info is not None else sum(child.size for child in self.children)

    def to_dict(self) -> dict[str, Any]:
        """The node and all below it, ready for JSON; `shape` and `axes` are None where it is no parameter."""
        info = self.info
        return {
            "name": self.name,
            "note": self.note,
            "shape": None if info is None else list(info.shape),
            "axes": None if info is None else list(info.axes),
            "size": self.size,
            "children": [child.to_dict() for child in self.children],
        }


def model_tree(model: Model) -> Node:
    """The model's parts in the order in which a token passes them, with a branch for each entry of the pattern."""
    config, parameters = model.config, model.parameters
    # The module with a ParameterInfo in place of each parameter; parts without parameters are in it, too.
    module = model.module(parameters)
    period = len(config.pattern)
    blocks = [
        _block(
            layer, module.blocks[entry], parameters["blocks"][entry], served_layers(entry, period, len(config.layers))
        )
        for entry, layer in enumerate(config.layers[:period])
    ]
    children = [
        Node("embedding", info=parameters["embedding"]),
        _part("position", config.position, parameters.get("position", {})),
        *blocks,
    ]
    if config.final_norm:
        children.append(_part("final_norm", config.norm, parameters.get("final_norm", {})))
    match config.head:
        case "untied":
            children.append(Node("head", info=parameters["head"]))
        case "tied":
            children.append(Node("head", "tied to the embedding"))
        case "none":
            children.append(Node("head", "none: the last hidden states are the logits"))
    shape = f"{config.num_layers} layers, embed_dim {config.width:,}, vocabulary {config.vocab_size:,}"
    dtypes = f"computed in {config.compute_dtype}, stored in {config.param_dtype}"
    return Node("model", f"{shape}, context {config.context_length:,}, {dtypes}", children=tuple(children))


def served_layers(entry: int, period: int, num_layers: int) -> str:
    """The layers that use entry `entry` of a pattern of `period` entries: `layers 0, 2, …, 30 (16 layers)`."""
    served = range(entry, num_layers, period)
    if len(served) == num_layers and num_layers > 1:
        return f"all {num_layers} layers"
    if len(served) == 1:
        return f"layer {entry}"
    listed = [*map(str, served)] if len(served) <= 4 else [str(served[0]), str(served[1]), "…", str(served[-1])]
    return f"layers {', '.join(listed)} ({len(served)} layers)"


def _block(layer: LayerConfig, module: nnx.Module, parameters: Mapping[str, Any], layers: str) -> Node:
    configs = {"attention": layer.attention, "feedforward": layer.feedforward}
    parts = {name for name, value in vars(module).items() if isinstance(value, nnx.Module)}
    children = []
    for name in sorted(parts | set(parameters), key=_reading_order):
        inside = parameters.get(name, {})
        config = layer.norm if name.endswith("norm") else configs.get(name)
        children.append(Node(name, info=inside) if isinstance(inside, ParameterInfo) else _part(name, config, inside))
    return Node(layers, _describe(layer.block), children=tuple(children))


def _reading_order(name: str) -> tuple[bool, str, int]:
    """First a shared norm, then attention, then the feed-forward, each between its own norms."""
    part, _, role = name.partition("_")
    return part != "norm", part, {"norm": 0, "": 1}.get(role, 2)


def _part(name: str, config: PartConfig | None, parameters: Mapping[str, Any]) -> Node:
    return Node(name, "" if config is None else _describe(config), children=_inside(parameters))


def _inside(parameters: Mapping[str, Any]) -> tuple[Node, ...]:
    return tuple(
        Node(str(name), info=value) if isinstance(value, ParameterInfo) else Node(str(name), children=_inside(value))
        for name, value in parameters.items()
    )


def _describe(part: PartConfig) -> str:
    """The part's kind and the settings that differ from their defaults, as written on a command line."""
    salient = {
        name: getattr(part, name)
        for name, field in type(part).model_fields.items()
        if name != "kind" and (field.is_required() or getattr(part, name) != field.default)
    }
    return " ".join([part.kind, *(f"{name}={_value(value)}" for name, value in salient.items())])


def _value(value: Any) -> str:
    if isinstance(value, PartConfig):
        return f"({_describe(value)})"
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
