"""Typed, frozen, validated configuration: YAML <-> objects, dotted overrides, slots for parts, helpful errors.

Knows nothing of models, data or training: each room declares its own `Config` classes from what is here.
"""

from __future__ import annotations

import importlib
import io
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.representer import SafeRepresenter

from polygpt.errors import RequestError, suggest

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every configuration: frozen, strict types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and scalars, ready for YAML or JSON."""
        return self.model_dump(mode="json")

    def replace(self: C, **changes: Any) -> C:
        """A validated copy with `changes`, given as dotted keys (`**{"attention.num_heads": 4}`) or plain ones.

        Raises:
            RequestError: a key is unknown, or a value does not fit.
        """
        return validate(type(self), merge(self.to_dict(), dotted_to_nested(changes)))


class PartConfig(Config):
    """Base of everything that fills a slot and is chosen by `kind`."""

    kind: str


# A YAML list becomes a tuple, so that configurations hash; strict mode alone would refuse the list.
Tuple = Annotated[tuple[C, ...], Field(strict=False)]

# `jax.random.key` drops the bits above 32: a larger seed would give the numbers of a smaller one.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class _PartError(ValueError):
    """The mistakes found inside a part, carried with the part's class so that they can be described."""

    def __init__(self, cls: type[PartConfig], error: ValidationError):
        super().__init__(str(error))
        self.cls, self.error = cls, error


def slot(base: type[PartConfig], menu: Mapping[str, type[PartConfig]], default: str | None = None) -> Any:
    """The annotated type of a slot: a mapping whose `kind` names an entry of `menu`, or a user's own part.

    A user's part is named by dotted path, `kind: package.module:ClassName`, and must derive from `base`. A mapping
    without a kind is of the kind `default`, where there is one.
    """

    def resolve(value: Any) -> Any:
        if isinstance(value, base):
            return value
        if isinstance(value, str):  # `norm: rmsnorm` is short for `norm: {kind: rmsnorm}`
            value = {"kind": value}
        if not isinstance(value, Mapping):
            raise ValueError(f"a mapping with a 'kind' is needed here, not {value!r}")
        value = {"kind": default, **value}
        kind = value["kind"]
        if not isinstance(kind, str):
            problem = "is missing" if kind is None else f"must be a name, not {kind!r}"
            raise ValueError(f"'kind' {problem}; choose from: {', '.join(menu)}")
        cls = _import_part(kind, base) if ":" in kind else menu.get(kind)
        if cls is None:
            own = " (a part of your own is named module:Class)" if "." in kind else ""
            raise ValueError(f"no kind '{kind}'; {suggest(kind, menu)}{own}")
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise _PartError(cls, error) from None

    return Annotated[SerializeAsAny[base], BeforeValidator(resolve)]


def _import_part(path: str, base: type[PartConfig]) -> type[PartConfig]:
    """The class that `package.module:ClassName` names; modules beside the user (the current folder) are found."""
    module_name, _, class_name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot import '{module_name}' of kind '{path}': {reason}") from error
    cls = getattr(module, class_name, None)
    if cls is None:
        fitting = [name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)]
        raise ValueError(f"module '{module_name}' has no '{class_name}'; {suggest(class_name, fitting)}")
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"'{path}' must be a class that derives from {base.__module__}.{base.__name__}")
    lacks = [f"'{name}'" for name in getattr(base, "needed", ()) if getattr(cls, name) is getattr(base, name)]
    if lacks:
        raise ValueError(f"'{path}' lacks {' and '.join(lacks)} (see docs/add-a-part.md)")
    return cls


def validate(cls: type[C], data: Mapping[str, Any], where: str = "") -> C:
    """`data` as a `cls`; `where` is put before the key's path in an error (a file's name, say).

    Raises:
        RequestError: in one to three lines, the first mistakes with the key's path and what would be right.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        lines = _describe(error, cls)
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        prefix = f"{where}: " if where else ""
        raise RequestError("\n".join(prefix + line for line in lines[:3]) + more) from None


# What pydantic says in Python's words, in a configuration's.
_NEEDED = {"model_type": "a mapping is needed", "tuple_type": "a list is needed", "too_short": "it must not be empty"}


def _describe(error: ValidationError, cls: type[Config], at: str = "") -> list[str]:
    lines: dict[str, list[str]] = {}  # by key: of a union, what its first member misses is enough
    for item in error.errors():
        steps, parent = _locate(cls, item["loc"])
        dotted = ".".join([at, *steps] if at else steps)
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, _PartError):
            told = _describe(cause.error, cause.cls, dotted)
        elif item["type"] == "extra_forbidden":
            told = [f"{dotted}: no such key; {_suggest_key(steps[-1], parent)}"]
        elif item["type"] == "missing":
            told = [f"{dotted}: this key is required"]
        elif item["type"] == "value_error":
            told = [f"{dotted}: {cause}" if dotted else str(cause)]
        else:
            needed = _NEEDED.get(item["type"], item["msg"][0].lower() + item["msg"][1:])
            told = [f"{dotted}: {needed}, not {item['input']!r}"]
        lines.setdefault(dotted, told)
    return [line for told in lines.values() for line in told]


def _locate(cls: type[Config], loc: Sequence[str | int]) -> tuple[list[str], type[Config]]:
    """The steps of a key's path below `cls`, without pydantic's names for the members of a union, and its parent."""
    steps: list[str] = []
    here: type[Config] | None = cls
    parent = cls
    for step in loc:
        if isinstance(step, int):  # an entry of a list: the same class as the list's
            steps.append(str(step))
        elif here is not None:
            steps.append(step)
            parent, here = here, _nested(here).get(step)
    return steps, parent


def _nested(cls: type[Config]) -> dict[str, type[Config]]:
    """The fields of `cls` that are plain (not slot) configurations, or lists of one."""
    found = {}
    for name, field in cls.model_fields.items():
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, Config) and not issubclass(candidate, PartConfig):
                found[name] = candidate
    return found


def _suggest_key(key: str, cls: type[Config]) -> str:
    """The nearest key of `cls`; or where the very key is, one level deeper: `steps` is `training.steps`."""
    deeper = [f"{name}.{key}" for name, inner in _nested(cls).items() if key in inner.model_fields]
    return f"did you mean '{deeper[0]}'?" if deeper else suggest(key, cls.model_fields)


# --- YAML ---------------------------------------------------------------------------------------------------


class _Representer(SafeRepresenter):
    """Writes a text with a Unicode line break in double quotes, where alone it is escaped and comes back."""

    def represent_str(self, data: str) -> Any:
        style = '"' if set(data) & {"\r", "\x85", "\u2028", "\u2029", "\ufeff"} else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def _yaml() -> YAML:
    # YAML 1.2 (`1e-3` is a float, `yes` a string) and duplicate keys refused; PyYAML gets all three wrong.
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = None
    yaml.width = 110
    yaml.sort_base_mapping_type_on_output = False
    return yaml


def parse_yaml(text: str, where: str = "YAML") -> Any:
    """The value of a YAML 1.2 text.

    Raises:
        RequestError: the text is not YAML, or a mapping repeats a key.
    """
    try:
        return _yaml().load(text)
    except MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RequestError(f"{where}{line}: {error.problem or error.context}") from None
    except YAMLError as error:
        raise RequestError(f"{where}: {str(error).splitlines()[0]}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file `path`.

    Raises:
        RequestError: there is no such file, it is not UTF-8, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 text (byte {error.start})") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise RequestError(f"{path}: a mapping is needed, not {type(value).__name__}")
    return value


def to_yaml(value: Config | Mapping[str, Any]) -> str:
    """`value` as YAML text, keys in the order of declaration."""
    stream = io.StringIO()
    _yaml().dump(value.to_dict() if isinstance(value, Config) else dict(value), stream)
    return stream.getvalue()


# --- Overrides ----------------------------------------------------------------------------------------------


# In YAML `*.txt` is an alias and `@` and others are reserved, for which a command line has no use; globs it has.
_NO_VALUE_STARTS_SO = ("*", "&", "@", "%", "`")


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words of a command line, the values read as YAML, as dotted keys.

    Raises:
        RequestError: a word has no `=`, or a key comes twice.
    """
    changes: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise RequestError(f"'{word}': settings are written key=value, such as training.steps=200")
        if key in changes:
            raise RequestError(f"{key}: given twice ({changes[key]!r} and {text!r}); keep one")
        if text.startswith(_NO_VALUE_STARTS_SO):
            changes[key] = text
        else:
            changes[key] = parse_yaml(text, key) if text else None
        if isinstance(changes[key], float) and not math.isfinite(changes[key]):
            raise RequestError(f"{key}: a finite number is needed, not {text}")
    return changes


def dotted_to_nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`; a key within a mapping that is given too is laid over it.

    Raises:
        RequestError: a plain value is given where a key goes deeper.
    """
    nested: dict[str, Any] = {}
    for key, value in sorted(changes.items(), key=lambda item: item[0].count(".")):
        *parents, last = key.split(".")
        place = nested
        for step in parents:
            place = place.setdefault(step, {})
            if not isinstance(place, dict):
                raise RequestError(f"{key}: '{step}' was given a plain value as well; keep one of the two")
        place[last] = dict(value) if isinstance(value, Mapping) else value
    return nested


def merge(base: Any, changes: Any) -> Any:
    """`changes` laid over `base`: mappings merge key by key, anything else is replaced.

    A mapping that names another `kind` than the base replaces it whole: the fields of one kind say nothing
    about another's. A base that is a kind's name alone stands for `{kind: name}`. An entry of a list is reached by its
    number (`pattern.0.feedforward.num_experts`).
    """
    if isinstance(base, list) and isinstance(changes, Mapping) and changes and all(k.isdigit() for k in changes):
        known = {str(i): entry for i, entry in enumerate(base)}
        if beyond := [key for key in changes if key not in known]:
            raise RequestError(f"there is no entry {beyond[0]}: the list has {len(base)}, the first is 0")
        return [merge(entry, changes[i]) if i in changes else entry for i, entry in known.items()]
    if isinstance(base, str) and isinstance(changes, Mapping):
        base = {"kind": base}
    if not (isinstance(base, Mapping) and isinstance(changes, Mapping)):
        return changes
    if "kind" in base and changes.get("kind", base["kind"]) != base["kind"]:
        return dict(changes)
    return {**base, **{key: merge(base.get(key), value) for key, value in changes.items()}}
