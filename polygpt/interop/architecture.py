"""A foreign architecture: the tensors that hold our parameters, and the settings that state our configuration.

Each name and each setting is written once and used in both directions. Import reads settings into a flat dictionary of
the fields of a `ModelConfig`, by dotted name (`attention.num_heads`); export writes settings from such a dictionary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from flax.traverse_util import unflatten_dict

from polygpt.config import Config, validate
from polygpt.errors import RequestError
from polygpt.interop.biases import with_biases
from polygpt.interop.names import Layout, NameTable
from polygpt.interop.same import computation, differences, resolved_parts
from polygpt.model import ModelConfig
from polygpt.settings import Settings

Fields = dict[str, Any]
REQUIRED: Any = object()


class SettingRule(Protocol):
    """One foreign setting, or several that belong together, and the fields they stand for."""

    def read(self, settings: Settings, fields: Fields) -> None:
        """Adds to `fields` what `settings` say."""

    def write(self, fields: Fields) -> dict[str, Any]:
        """The settings for `fields`. A field that the model lacks (its part is of another kind) is left out."""


@dataclass(frozen=True)
class Setting:
    """One setting that is one field.

    Attributes:
        name: theirs.
        field: ours.
        type: of the setting.
        default: the setting's value where it is absent or null; a function computes it from the fields read so far.
        to_ours: converts a setting's value (other than None) to the field's.
        to_theirs: the inverse.
    """

    name: str
    field: str
    type: type = int
    default: Any = REQUIRED
    to_ours: Callable[[Any], Any] = lambda value: value
    to_theirs: Callable[[Any], Any] = lambda value: value

    def read(self, settings: Settings, fields: Fields) -> None:
        default = self.default(fields) if callable(self.default) else self.default
        value = settings.take(self.name, self.type, *([] if default is REQUIRED else [default]))
        fields[self.field] = value if value is None else self.to_ours(value)

    def write(self, fields: Fields) -> dict[str, Any]:
        if self.field in fields:
            return {self.name: self.to_theirs(fields[self.field])}
        # Readable all the same, so that the comparison can name the part of another kind.
        return {self.name: 1} if self.default is REQUIRED else {}


@dataclass(frozen=True)
class Rule:
    """Several settings that belong together, as two functions."""

    read: Callable[[Settings, Fields], None]
    write: Callable[[Fields], dict[str, Any]] = lambda fields: {}


def flag(name: str, field: str, *, default: bool = False, true: Any = True, false: Any = False) -> Setting:
    """A setting that is true or false, for a field with two values that the architecture knows."""
    return Setting(name, field, bool, default, {True: true, False: false}.get, lambda value: value == true)


def required(name: str, expected: Any, why: str) -> Rule:
    """Refuses any value of a setting but one; `why` says what another would need."""
    return Rule(lambda settings, fields: settings.require(name, expected, why))


def written(name: str, field: str) -> Rule:
    """A setting that is written for others' sake and does not affect what is computed."""
    return Rule(lambda settings, fields: settings.ignore(name), lambda fields: {name: fields[field]})


@dataclass(frozen=True)
class Heads:
    """Numbers of heads, and the size of a head: by default the embedding's share.

    Attributes:
        heads: the setting's name for `num_heads`.
        kv_heads: for `num_kv_heads`.
        head_dim: for `head_dim`.
        repeated: further settings that must equal the size, with the reason.
        writes_head_dim: False for architectures that other tools read without a `head_dim`.
    """

    heads: str
    kv_heads: str
    head_dim: str
    repeated: Mapping[str, str] = field(default_factory=dict)
    writes_head_dim: bool = True

    def read(self, settings: Settings, fields: Fields) -> None:
        heads, width = settings.take(self.heads, int), fields["embed_dim"]
        if heads < 1:
            raise settings.error(f"'{self.heads}' is {heads}; it must be greater than 0")
        fields["attention.num_heads"] = heads
        fields["attention.num_kv_heads"] = settings.take(self.kv_heads, int, heads)
        head_dim = settings.take(self.head_dim, int, None)
        if head_dim is not None and head_dim * heads != width:
            fields["attention.head_dim"] = head_dim
        for name, why in self.repeated.items():
            settings.require(name, head_dim or width // heads, why)

    def write(self, fields: Fields) -> dict[str, Any]:
        settings = {self.heads: fields.get("attention.num_heads", 1)}
        settings[self.kv_heads] = fields.get("attention.num_kv_heads", 1)
        if self.writes_head_dim and "attention.head_dim" in fields:
            settings |= dict.fromkeys([self.head_dim, *self.repeated], fields["attention.head_dim"])
        return settings


@dataclass(frozen=True)
class Architecture:
    """One architecture of another library.

    Attributes:
        name: as its files state it (`LlamaForCausalLM`, `llama`).
        names: foreign tensor -> our parameters.
        settings: what its configuration says, in the order in which it is read.
        fixed: fields of ours that are always so.
        defaults: settings that its class assumes where they are absent (null is not absent).
        layout: how tensors are stored.
        ignored: a pattern of tensors that hold no weights.
        zero_biases: it has biases everywhere; a model without some is written with zeros in their place.
        model_type: a second name (`model_type` in config.json).
        prefix: what its tensors' names begin with; files of the bare decoder leave it out.
    """

    name: str
    names: NameTable
    settings: tuple[SettingRule, ...]
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    layout: Layout = field(default_factory=Layout)
    ignored: str = r"(?!)"
    zero_biases: bool = False
    model_type: str = ""
    prefix: str = ""

    def read(self, settings: Settings) -> dict[str, Any]:
        """The fields of a `ModelConfig`, nested.

        Raises:
            RequestError: a setting is unknown, missing, or asks for something that does not exist here.
        """
        settings.set_defaults(self.defaults)
        fields = dict(self.fixed)
        for rule in self.settings:
            rule.read(settings, fields)
        settings.finish()
        return unflatten_dict(fields, sep=".")

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The settings that come nearest to `config`."""
        fields = _flat(config)
        return {name: value for rule in self.settings for name, value in rule.write(fields).items()}


def _flat(config: ModelConfig) -> Fields:
    """The fields of a model and of its first layer by dotted name; `windows` are those of all layers."""
    parts = resolved_parts(config.layers[0], config, Config.to_dict) | {"position": config.position.to_dict()}
    return {
        **{name: value for name, value in config.to_dict().items() if not isinstance(value, dict)},
        **{f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()},
        "vocab_size": config.vocab_size - config.vocab_padding,
        "embed_dim": config.width,
        "windows": [getattr(layer.attention, "window", None) for layer in config.layers],
    }


def counterpart(
    config: ModelConfig,
    architectures: Iterable[Architecture],
    read: Callable[[Architecture, dict[str, Any]], dict[str, Any]],
    refusal: str,
) -> Architecture:
    """The architecture that computes what `config` does: its settings for `config`, read back, compute the same.

    Args:
        config: the model.
        architectures: the candidates, the preferred first.
        read: an architecture's settings -> fields of a `ModelConfig`, as a file with these settings would be read.
        refusal: how the error begins.

    Raises:
        RequestError: there is none; what the nearest lacks is named.
    """
    if not config.num_layers:
        raise RequestError(f"{refusal}: num_layers=0 has no counterpart")
    nearest, reason = math.inf, "none is near"
    for architecture in architectures:
        full = with_biases(config) if architecture.zero_biases else config
        try:
            found = computation(validate(ModelConfig, read(architecture, architecture.write(full))))
        except RequestError:  # its own parts do not fit this model's shape
            continue
        differing = differences(computation(full), found)
        if not differing:
            return architecture
        key, ours, theirs = differing[0]
        # Parts of different kinds may differ in everything, so a kind counts as several settings.
        distance = sum(5 if key.endswith(".kind") else 1 for key, *_ in differing)
        if distance < nearest:
            nearest = distance
            reason = f"{key}={ours} has no counterpart; {architecture.name}, the nearest, has {theirs}"
    raise RequestError(f"{refusal}: {reason}")
