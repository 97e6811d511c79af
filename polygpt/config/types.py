"""Types of plain fields as data: enough to refuse a wrong value without the classes, which import JAX."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import or_
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WrapValidator,
)
from pydantic.fields import FieldInfo

from polygpt.config.fields import read

Type = dict[str, Any]
_SCALARS = {"int": int, "float": float, "str": str, "bool": bool, "null": NoneType}
_NAMES = {cls: name for name, cls in _SCALARS.items()}
_ARGUMENTS = ("gt", "ge", "lt", "le", "min_length", "max_length", "pattern", "strict")
# As of every `Config`.
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
# pydantic's messages in terms of a configuration rather than of Python's types.
_NEEDED = {
    "model_type": "a mapping is needed",
    "dict_type": "a mapping is needed",
    "tuple_type": "a list is needed",
    "too_short": "it must not be empty",
}


def type_of(field: FieldInfo) -> Type | None:
    """The field's type, ready for JSON; None if it is not made of scalars, choices and lists.

    `{"any": [...]}` lists what the value may be: the name of a scalar type, `{"choices": [...]}`, `{"list": type}` or
    another type. Beside it are bounds and other arguments of pydantic's `Field`.
    """
    try:
        return _encoded(field.annotation, field.metadata)
    except _Other:
        return None


class _Other(Exception):
    """A type that is not described."""


def _encoded(annotation: Any, marks: Iterable[Any] = ()) -> Type:
    if get_origin(annotation) is Annotated:
        inner, *own = get_args(annotation)
        return _encoded(inner, [*own, *marks])
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    return reduce(or_, map(_arguments, marks), {"any": [_member(member) for member in members]})


def _member(annotation: Any) -> Any:
    if annotation in _NAMES:
        return _NAMES[annotation]
    match get_origin(annotation), get_args(annotation):
        case origin, choices if origin is Literal:
            return {"choices": list(choices)}
        case origin, (entry, end) if origin is tuple and end is Ellipsis:
            return {"list": _encoded(entry)}
        case origin, _ if origin is Annotated:
            return _encoded(annotation)
    raise _Other


def _arguments(mark: Any) -> Type:
    """The arguments of `Field` that an annotation's mark stands for."""
    if isinstance(mark, FieldInfo):
        return reduce(or_, map(_arguments, mark.metadata), {})
    if isinstance(mark, annotated_types.GroupedMetadata):
        return reduce(or_, map(_arguments, mark), {})
    if isinstance(mark, AfterValidator | BeforeValidator | PlainValidator | WrapValidator):
        raise _Other
    return {name: getattr(mark, name) for name in _ARGUMENTS if getattr(mark, name, None) is not None}


def _decoded(described: Any) -> Any:
    """The annotation that `_encoded` took apart."""
    if isinstance(described, str):
        return _SCALARS[described]
    if "choices" in described:
        return Literal[tuple(described["choices"])]
    if "list" in described:
        return tuple[_decoded(described["list"]), ...]
    bounds = {name: value for name, value in described.items() if name != "any"}
    union = reduce(or_, map(_decoded, described["any"]))
    return Annotated[union, Field(**bounds)] if bounds else union


def wrong_values(described: Type, value: Any, path: str) -> dict[str, str]:
    """What is wrong with a field's `value`, by path: nothing, one thing, or the mistakes in the entries of a list."""
    annotation = _decoded(described)
    try:
        TypeAdapter(annotation, config=STRICT).validate_python(read(annotation, value))
    except ValidationError as error:
        found: dict[str, str] = {}
        for item in error.errors():
            at = ".".join([path, *(str(step) for step in item["loc"] if isinstance(step, int))])
            found.setdefault(at, f"{at}: {wrong_value(item)}")  # of a union, what its first member misses is enough
        return found
    return {}


def wrong_value(item: Any) -> str:
    """What pydantic found wrong with a value, in the words of a configuration."""
    message = item["msg"].removeprefix("Input ").replace("should ", "must ", 1)
    needed = _NEEDED.get(item["type"], message[0].lower() + message[1:])
    return f"{needed}, not {item['input']!r}"
