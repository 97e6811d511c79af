"""The base classes of every configuration, slots for parts, and validation whose errors name the key and the fix."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError

from polygpt.config.fields import Slot, nested, typed
from polygpt.config.keys import MOST_TOLD, known_keys, no_such_key, no_such_kind, refuse
from polygpt.config.overrides import dotted_to_nested, merge
from polygpt.config.types import STRICT, wrong_value
from polygpt.errors import suggest

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every configuration: frozen, strict types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(**STRICT, frozen=True, extra="forbid", validate_default=True)

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

    is_part: ClassVar[bool] = True
    kind: str


# A YAML list becomes a tuple, so that configurations hash; strict mode alone would refuse the list.
Tuple = Annotated[tuple[C, ...], Field(strict=False)]

# `jax.random.key` drops the bits above 32: a larger seed would give the numbers of a smaller one.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class _PartError(ValueError):
    """The mistakes in a part, with the part's class, whose keys the error message needs."""

    def __init__(self, cls: type[PartConfig], error: ValidationError):
        super().__init__(str(error))
        self.cls, self.error = cls, error


def slot(base: type[PartConfig], registry: Mapping[str, type[PartConfig]], default: str | None = None) -> Any:
    """The annotated type of a slot: a mapping whose `kind` names an entry of `registry`, or a user's own part.

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
        before = getattr(value, "before", None)
        value = {"kind": default, **value}
        kind = value["kind"]
        if not isinstance(kind, str):
            problem = "is missing" if kind is None else f"must be a name, not {kind!r}"
            raise ValueError(f"'kind' {problem}; choose from: {', '.join(registry)}")
        cls = _import_part(kind, base) if ":" in kind else registry.get(kind)
        if cls is None:
            raise ValueError(no_such_kind(kind, registry))
        if before is not None:
            value = _kept(before, registry.get(str(before["kind"])), cls, base) | value
        try:
            return cls.model_validate(typed(cls, value))
        except ValidationError as error:
            raise _PartError(cls, error) from None

    return Annotated[SerializeAsAny[base], BeforeValidator(resolve), Slot(registry, default)]


def _kept(
    fields: Mapping[str, Any], old: type[PartConfig] | None, new: type[PartConfig], base: type[PartConfig]
) -> dict[str, Any]:
    """Of a part's `fields` those that its successor shares: inherited from one class, or required by both kinds.

    Fields of the slot's `base` are not: what is a good learning rate for one optimizer is not for another.
    """
    if old is None:
        return {}

    def shared(name: str) -> bool:
        origins = (next(c for c in cls.__mro__ if name in vars(c).get("__annotations__", ())) for cls in (old, new))
        return len(set(origins)) == 1 or (old.model_fields[name].is_required() and new.model_fields[name].is_required())

    common = (fields.keys() & old.model_fields.keys() & new.model_fields.keys()) - set(base.model_fields)
    return {name: fields[name] for name in common if shared(name)}


def _import_part(path: str, base: type[PartConfig]) -> type[PartConfig]:
    """The class that `package.module:ClassName` names; modules in the current folder are found."""
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
        return cls.model_validate(typed(cls, data))
    except ValidationError as error:
        refuse(_describe(error, cls), where)
        raise  # never: a validation error has at least one line


def _describe(error: ValidationError, cls: type[Config], at: str = "") -> list[str]:
    lines: dict[str, list[str]] = {}  # by key: of a union, what its first member misses is enough
    for item in error.errors():
        steps, parent = _locate(cls, item["loc"])
        dotted = ".".join([at, *steps] if at else steps)
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, _PartError):
            said = _describe(cause.error, cause.cls, dotted)
        elif item["type"] == "extra_forbidden":
            # Finding the nearest key takes a millisecond, and a mistake that is not told is only counted.
            said = [no_such_key(dotted, known_keys(parent)) if len(lines) < MOST_TOLD else dotted]
        elif item["type"] == "missing":
            kinds = (known_keys(parent)[steps[-1]] or {}).get("kinds", ())
            said = [f"{dotted}: this key is required" + (f"; choose from: {', '.join(kinds)}" if kinds else "")]
        elif item["type"] == "value_error":
            said = [f"{dotted}: {cause}" if dotted else str(cause)]
        else:
            said = [f"{dotted}: {wrong_value(item)}"]
        lines.setdefault(dotted, said)
    return [line for said in lines.values() for line in said]


def _locate(cls: type[BaseModel], loc: Sequence[str | int]) -> tuple[list[str], type[BaseModel]]:
    """The steps of a key's path below `cls`, without pydantic's names for the members of a union, and its parent."""
    steps: list[str] = []
    here: type[BaseModel] | None = cls
    parent: type[BaseModel] = cls
    for step in loc:
        if isinstance(step, int):  # an entry of a list: the same class as the list's
            steps.append(str(step))
        elif here is not None and step != here.__name__:
            steps.append(step)
            field = here.model_fields.get(step)
            parent, here = here, None if field is None else nested(field)
    return steps, parent
