"""The files beside the weights: tokenizer, ids of special tokens, chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polygpt.errors import RequestError
from polygpt.settings import LIMIT, Settings, read_json
from polygpt.tokenizers import Tokenizer, has_tokenizer, load_tokenizer

TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
_ROLES = ("bos_token", "eos_token", "pad_token")


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer, if it has one. Ids in the model's configuration give the roles that it does not name.

    Raises:
        RequestError: there is one and it cannot be used.
    """
    if not has_tokenizer(folder):
        return None
    roles: dict[str, int] = {}
    for path in (folder / "config.json", folder / GENERATION):
        values = read_json(path) if path.is_file() else {}
        for role in _ROLES:
            if numbers := _ids(values.get(f"{role}_id"), f"{path}: {role}_id"):
                roles[role] = numbers[0]
    return load_tokenizer(folder, roles)


def read_stop_tokens(folder: Path, settings: Settings) -> tuple[int, ...]:
    """The ids that end a text: those of generation_config.json, or else of config.json.

    Raises:
        RequestError: one is not an integer.
    """
    path = folder / GENERATION
    named, where = read_json(path).get("eos_token_id") if path.is_file() else None, str(path)
    if named is None:
        named, where = settings.get("eos_token_id"), settings.where
    return tuple(number for number in _ids(named, f"{where}: eos_token_id") if number >= 0)


def _ids(value: Any, where: str) -> list[int]:
    """The ids in `value`: a number, a list of numbers, or None. Negative numbers stand for no token in some files."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(number) is not int for number in values):
        raise RequestError(f"{where} is {value!r}; it must be a token's id, or a list of ids")
    return values


def read_chat_template(folder: Path) -> str | None:
    """The template of chat_template.jinja or of tokenizer_config.json."""
    path = folder / CHAT_TEMPLATE
    if path.is_file():
        if path.stat().st_size > LIMIT:
            raise RequestError(f"{path}: {path.stat().st_size:,} bytes exceed the limit of {LIMIT:,} for a template")
        return path.read_text(encoding="utf-8", errors="replace")
    path = folder / TOKENIZER_CONFIG
    template = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def role_ids(tokenizer: Tokenizer | None, stop_tokens: tuple[int, ...]) -> dict[str, Any]:
    """The ids of special tokens as config.json and generation_config.json state them; None where there is no token."""
    ids: dict[str, Any] = dict.fromkeys((f"{role}_id" for role in _ROLES), None)
    if tokenizer is None:
        return ids
    ids = {name: tokenizer.role(name.removesuffix("_id")) for name in ids}
    end = tokenizer.end_of_text
    stops = list(dict.fromkeys([*stop_tokens, *([] if end is None else [end])]))
    if stops:
        ids["eos_token_id"] = stops if len(stops) > 1 else stops[0]
        ids["bos_token_id"] = next(i for i in (ids["bos_token_id"], *tokenizer.start, stops[0]) if i is not None)
    return ids


def write_text_files(folder: Path, tokenizer: Tokenizer, context_length: int, stop_tokens: tuple[int, ...]) -> None:
    """Writes the tokenizer and what transformers needs to know about it."""
    tokenizer.save(folder / TOKENIZER)
    names = {number: token for token, number in tokenizer.special_tokens.items()}
    end = names.get(tokenizer.end_of_text)
    guesses = {"eos_token": end, "bos_token": names.get(tokenizer.start[0]) if tokenizer.start else end}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        **(tokenizer.roles or guesses),
    }
    write_json(folder / TOKENIZER_CONFIG, {name: value for name, value in settings.items() if value is not None})
    ids = {name: value for name, value in role_ids(tokenizer, stop_tokens).items() if value is not None}
    if ids:
        write_json(folder / GENERATION, ids)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
