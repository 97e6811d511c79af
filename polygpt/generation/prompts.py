"""What a user gives as prompts, ids, seeds, numbers and settings, taken apart; all else is refused in one line."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from polygpt.config import validate
from polygpt.errors import RequestError, suggest
from polygpt.generation.sampling import Sampler

# Text, or the ids that it is made of.
Prompt = str | Sequence[int]
BEAM_SETTINGS = ("length_penalty", "early_stopping", "beam_groups", "diversity_penalty")
CONSTRAINTS = ("schema", "regex", "choices", "grammar")
_WANTED = "a prompt is text or a list of token ids, and several are a list of them"


def as_prompts(given: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts that were given, and whether it was a single one.

    Raises:
        RequestError: it is none of what `LanguageModel.generate` takes.
    """
    if isinstance(given, str):
        return [given], True
    items = _items(given)
    if items is None:
        raise RequestError(f"{_shown(given)} is no prompt: {_WANTED}")
    if not items:
        raise RequestError(f"an empty list is no prompt: {_WANTED}")
    if all(_is_integer(item) for item in items):
        return [list(map(int, items))], True
    prompts = [item if isinstance(item, str) else _items(item) for item in items]
    for number, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
        if isinstance(item, dict):
            raise RequestError(f"prompt {number} is a dict, not text: for a chat message give its text and chat=True")
        if prompt is None or not (isinstance(prompt, str) or all(_is_integer(token) for token in prompt)):
            raise RequestError(f"prompt {number} is {_shown(item)}: {_WANTED}")
    return [prompt if isinstance(prompt, str) else list(map(int, prompt)) for prompt in prompts], False


def as_seeds(given: int | Sequence[int], count: int | None) -> list[int]:
    """A seed for each of `count` prompts; None is a single prompt, which takes a single seed.

    Raises:
        RequestError: it is neither a seed nor a list of as many.
    """
    if _is_integer(given):
        return [int(given)] * (count or 1)
    seeds = _items(given)
    if seeds is None or not all(_is_integer(seed) for seed in seeds):
        raise RequestError(f"seed must be a whole number, or for a list of prompts a list of them, not {_shown(given)}")
    if count is None or len(seeds) != count:
        prompts = "a single prompt, which takes a single seed" if count is None else f"{count} prompts"
        raise RequestError(f"seeds and prompts differ in number: {len(seeds)} seeds for {prompts}")
    return list(map(int, seeds))


def as_ids(given: Sequence[int], name: str, least: int | None = 0) -> list[int]:
    """Token ids, as plain integers from `least` on; `name` is that of the setting.

    Raises:
        RequestError: it is something else.
    """
    ids = None if isinstance(given, str) else _items(given)
    if ids is None or not all(_is_integer(token) and (least is None or token >= least) for token in ids):
        raise RequestError(f"{name} must be a list of token ids, not {_shown(given)}")
    return list(map(int, ids))


def as_stop_strings(given: str | Sequence[str]) -> tuple[str, ...]:
    """The stop strings; a single one may stand alone.

    Raises:
        RequestError: one is empty, or is not a string.
    """
    words = [given] if isinstance(given, str) else _items(given)
    if words is None or not all(isinstance(word, str) for word in words):
        raise RequestError(f"stop must be a list of strings, not {_shown(given)}")
    if "" in words:
        raise RequestError("a stop string is empty; leave it out")
    return tuple(words)


def _items(given: Any) -> list[Any] | None:
    """The items of a list, a tuple, a range or an array."""
    if isinstance(given, list | tuple | range):
        return list(given)
    is_array = hasattr(given, "__array__") and np.ndim(given) > 0
    return list(np.asarray(given)) if is_array else None


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return f"{value!r:.40} ({type(value).__name__})"


def as_settings(settings: Mapping[str, Any], others: Iterable[str]) -> tuple[Sampler, dict[str, Any], dict[str, Any]]:
    """The sampler of keyword arguments, those of beam search, and the constraint; `others` may be given beside them.

    Raises:
        RequestError: one of them does not exist, or a sampler's value is out of range.
    """
    known = [*Sampler.model_fields, *BEAM_SETTINGS, *CONSTRAINTS]
    for name in settings.keys() - set(known):
        raise RequestError(f"{name}: no such setting; {suggest(name, [*known, *others])}")
    search, constraint = ({key: settings[key] for key in of if key in settings} for of in (BEAM_SETTINGS, CONSTRAINTS))
    return validate(Sampler, {key: settings[key] for key in settings.keys() & Sampler.model_fields}), search, constraint


def as_whole(given: Any, name: str, least: int, most: int | None = None) -> int:
    """A whole number from `least` to `most`; `name` is that of the setting.

    Raises:
        RequestError: it is something else.
    """
    if not _is_integer(given) or given < least or (most is not None and given > most):
        bounds = f"of at least {least}" if most is None else f"in {least}..{most}"
        raise RequestError(f"{name} must be a whole number {bounds}, not {given!r:.40}")
    return int(given)
