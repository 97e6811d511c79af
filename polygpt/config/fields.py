"""What a configuration's annotations say: which fields are slots or configurations, and how words are read for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from polygpt.config.words import Word, WordList, WordMapping, as_yaml


@dataclass(frozen=True, eq=False)  # hashed by identity: annotations are
class Slot:
    """Marks a field that a part fills: its registry (kind -> class), and the kind of a mapping that names none."""

    registry: Mapping[str, type[BaseModel]]
    default: str | None = None


def slot_of(field: FieldInfo) -> Slot | None:
    """The slot that the field, or each entry of it, is; None for any other field."""
    return next((mark for mark in (*field.metadata, *_marks(field.annotation)) if isinstance(mark, Slot)), None)


def nested(field: FieldInfo) -> type[BaseModel] | None:
    """The configuration (not a part) that the field, or each entry of it, is; None for any other field."""
    return _nested(field.annotation)


def _nested(annotation: Any) -> type[BaseModel] | None:
    members = list(_members(annotation))
    entries = _entries(members)
    found = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
    if found:
        return None if getattr(found[0], "is_part", False) else found[0]
    return None if entries is None else _nested(entries)


def typed(cls: type[BaseModel], data: Any) -> Any:
    """`data` for a `cls` with its words read by the types of its fields; those of a part wait for the part's class."""
    if not isinstance(data, Mapping):
        return as_yaml(data)
    fields = cls.model_fields
    return {
        name: read(fields[name].annotation, value) if name in fields else as_yaml(value) for name, value in data.items()
    }


def read(annotation: Any, value: Any) -> Any:
    if isinstance(value, (int, float)):  # a request may bring thousands of token ids
        return value
    members = list(_members(annotation))
    if isinstance(value, Word):
        if str not in members:
            return value.value()
        return None if not value or (NoneType in members and value in ("null", "~")) else value.as_text()
    if str in members and (
        isinstance(value, WordMapping) or (isinstance(value, WordList) and _entries(members) is None)
    ):
        return value.text
    if isinstance(value, (list, tuple)):
        inner = _entries(members) or Any
        return [read(inner, entry) for entry in value]
    if isinstance(value, Mapping) and (inner := _nested(annotation)) is not None:
        return typed(inner, value)
    if isinstance(value, Mapping) and (values := _values(members)) is not None:
        return {name: read(values, entry) for name, entry in value.items()}
    return value


def _members(annotation: Any) -> Iterator[Any]:
    """The types that `annotation` is a union of."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _entries(members: list[Any]) -> Any:
    """The type of the entries of the list that is among `members`; None if there is none."""
    return next((get_args(member)[0] for member in members if get_origin(member) in (tuple, list)), None)


def _values(members: list[Any]) -> Any:
    """The type of the values of the mapping that is among `members`; None if there is none."""
    return next((get_args(member)[1] for member in members if get_origin(member) is dict), None)


def _marks(annotation: Any) -> Iterator[Any]:
    """What is annotated anywhere within `annotation`."""
    if get_origin(annotation) is Annotated:
        yield from annotation.__metadata__
    for inner in get_args(annotation):
        yield from _marks(inner)
