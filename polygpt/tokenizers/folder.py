"""Reading a tokenizer from files: tokenizer.json, or vocab.json with merges.txt, and the configuration beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers as hf

from polygpt import hub
from polygpt.errors import RequestError
from polygpt.files import expand
from polygpt.settings import read_json
from polygpt.tokenizers.tokenizer import CONFIG_FILE, FILE, Tokenizer
from polygpt.tokenizers.vocab_merges import MERGES, VOCAB, read_vocab_and_merges


def load_tokenizer(path: str | Path, roles: Mapping[str, Any] | None = None) -> Tokenizer:
    """The tokenizer in `path`: a tokenizer.json, or a folder with one or with vocab.json and merges.txt.

    A folder's tokenizer_config.json and special_tokens_map.json say which tokens begin and end a text and pad it.

    Args:
        path: the file or folder, or `hf:owner/name[@revision]` on the Hugging Face hub.
        roles: what else is known of them, as for `Tokenizer`. The folder's own files come first; if they name any
            token, only the end of a text is taken from here, since templates test which of the others are named.

    Raises:
        RequestError: there is none, or a file is damaged.
        PolygptError: the hub cannot be reached.
    """
    path = hub.fetch(str(path), hub.TOKENIZER_FILES, "tokenizer") if str(path).startswith(hub.PREFIX) else expand(path)
    folder = path if path.is_dir() else path.parent
    beside = _read_roles(folder) if path.is_dir() or path.name == FILE else {}
    if path.is_dir() and not has_tokenizer(path):
        raise RequestError(f"{path}: this folder holds no {FILE}, nor {VOCAB} with {MERGES}")
    if path.is_dir() and not (path / FILE).is_file():
        made, beside = read_vocab_and_merges(path, beside)
        path = path / VOCAB
    else:
        path = path / FILE if path.is_dir() else path
        made = _read_file(path)
        if path.name == FILE:
            _add_listed(path.with_name(CONFIG_FILE), made)
    named = {role: value for role, value in beside.items() if value is not None}
    others = roles or {}
    others = {"eos_token": others.get("eos_token")} if named else others
    try:
        return Tokenizer(made, {**others, **named})
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


def has_tokenizer(folder: Path) -> bool:
    """Whether `load_tokenizer` finds the files it needs in `folder`."""
    return (folder / FILE).is_file() or all((folder / name).is_file() for name in (VOCAB, MERGES))


def _read_roles(folder: Path) -> dict[str, Any]:
    """The roles that the folder's files give to tokens, as transformers reads them."""
    config: dict[str, Any] = {}
    older: dict[str, Any] = {}
    if (folder / CONFIG_FILE).is_file():
        config = read_json(folder / CONFIG_FILE)
    if (folder / "special_tokens_map.json").is_file() and "added_tokens_decoder" not in config:
        older = read_json(folder / "special_tokens_map.json")
    named = {name: value for name, value in {**config, **older}.items() if name.endswith("_token")}
    return {name: value for name, value in named.items() if type(value) is not bool}


def _read_file(path: Path) -> hf.Tokenizer:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file; give a {FILE}, or a folder that holds one") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not JSON ({error})") from None
    try:
        made = hf.Tokenizer.from_str(text)
    except BaseException as error:  # the library raises plain Exceptions, and BaseExceptions where its Rust code panics
        if isinstance(error, KeyboardInterrupt):
            raise
        _check_json(text, path)
        raise RequestError(f"{path}: not a {FILE} ({str(error).splitlines()[0]})") from None
    for token in json.loads(text).get("added_tokens") or []:
        _check_id(made, token["content"], token["id"], f"{path}: added_tokens")
    return made


def _add_listed(path: Path, made: hf.Tokenizer) -> None:
    """Adds the tokens that tokenizer_config.json lists and tokenizer.json lacks, as transformers does.

    Raises:
        RequestError: an id there contradicts tokenizer.json.
    """
    listed = read_json(path).get("added_tokens_decoder") if path.is_file() else None
    if listed is None:
        return
    where = f"{path}: added_tokens_decoder"
    known = {token.content for token in made.get_added_tokens_decoder().values()}
    try:
        tokens = {int(number): hf.AddedToken(**token) for number, token in listed.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise RequestError(f"{where}: not a list of added tokens ({str(error).splitlines()[0]})") from None
    for number, token in sorted(tokens.items()):
        if token.content not in known:
            (made.add_special_tokens if token.special else made.add_tokens)([token])
        _check_id(made, token.content, number, where)


def _check_id(made: hf.Tokenizer, token: str, number: int, where: str) -> None:
    """Refuses an id that is not the one under which the library knows the token."""
    actual = made.token_to_id(token)
    if actual != number:
        raise RequestError(
            f"{where} gives {token!r} the id {number}, but {FILE} gives it {actual};\nmake the two agree: "
            "the model was trained with one of them"
        )


def _check_json(text: str, path: Path) -> None:
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not JSON ({str(error).splitlines()[0]})") from None
