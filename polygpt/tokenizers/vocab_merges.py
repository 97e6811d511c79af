"""Byte-level BPE from vocab.json and merges.txt, as the class named by the folder's configuration builds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers as hf
from tokenizers import pre_tokenizers

from polygpt.errors import RequestError
from polygpt.settings import read_json
from polygpt.tokenizers.config import END_OF_TEXT
from polygpt.tokenizers.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from polygpt.tokenizers.sentencepiece import put_before
from polygpt.tokenizers.tokenizer import CONFIG_FILE, token_text

VOCAB, MERGES = "vocab.json", "merges.txt"
_ORDER = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


class _Class(NamedTuple):
    """A tokenizer class of transformers: how it splits text, its default roles, the model types that imply it."""

    pre: PreTokenizer
    roles: Mapping[str, str]
    model_types: frozenset[str]


_PLAIN, _QWEN2 = PRE_TOKENIZERS["gpt-2"], PRE_TOKENIZERS["qwen2"]
_ENDS = dict.fromkeys(("unk_token", "bos_token", "eos_token"), END_OF_TEXT)
_GPT2 = _Class(_PLAIN, _ENDS, frozenset({"gpt2", "gpt_neo", "gptj", "codegen", "opt", "phi", "starcoder2"}))
_CLASSES = {
    "GPT2Tokenizer": _GPT2,
    "CodeGenTokenizer": _GPT2,
    "GPTNeoXTokenizer": _Class(
        _PLAIN._replace(nfc=True), {**_ENDS, "pad_token": "<|padding|>"}, frozenset({"gpt_neox", "olmo", "olmoe"})
    ),
    "Qwen2Tokenizer": _Class(
        _QWEN2,
        dict.fromkeys(("unk_token", "eos_token", "pad_token"), END_OF_TEXT),
        frozenset({"qwen2", "qwen2_moe", "qwen3", "qwen3_moe"}),
    ),
}


def read_vocab_and_merges(folder: Path, roles: Mapping[str, Any]) -> tuple[hf.Tokenizer, dict[str, Any]]:
    """The tokenizer of a folder without tokenizer.json, and `roles` with those that its class gives to tokens.

    Raises:
        RequestError: a file is damaged, or the configuration names a class that is not known here.
    """
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    known = _find_class(folder, config)
    made = _read_bpe(folder)
    known.pre.apply(made)
    if config.get("add_prefix_space"):
        *before, last = known.pre.steps
        spaced = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=last.use_regex)
        made.pre_tokenizer = pre_tokenizers.Sequence([*before, spaced]) if before else spaced
    made.decoder = hf.decoders.ByteLevel()
    roles = {**known.roles, **roles}
    _add_listed(folder, made, config, {token_text(value) for value in roles.values()})
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = [roles.get(role) for role in dict.fromkeys((*_ORDER, *roles))]
    _add_specials(made, [*named, *(extra if isinstance(extra, list) else [])], {*known.roles.values()})
    roles = {role: value for role, value in roles.items() if made.token_to_id(token_text(value) or "") is not None}
    start = token_text(roles.get("bos_token"))
    if config.get("add_bos_token") and start is not None:
        put_before(made, start, made.token_to_id(start))
    return made, roles


def _find_class(folder: Path, tokenizer_config: Mapping[str, Any]) -> _Class:
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    model_type = config.get("model_type")
    name = str(tokenizer_config.get("tokenizer_class") or config.get("tokenizer_class") or "").removesuffix("Fast")
    implied = next((known for known in _CLASSES.values() if model_type in known.model_types), None)
    if name and model_type != "qwen2":  # transformers does not trust what folders of Qwen2 name
        found = _CLASSES.get(name)
    else:
        found = implied or (_GPT2 if model_type is None else None)
    if found is None:
        what = f"tokenizer_class '{name}'" if name else f"model_type '{model_type}'"
        raise RequestError(
            f"{folder}: {VOCAB} and {MERGES} do not say how {what} splits text; put its tokenizer.json beside them,\n"
            f"or name one of {', '.join(_CLASSES)} as tokenizer_class in {CONFIG_FILE}"
        )
    return found


def _read_bpe(folder: Path) -> hf.Tokenizer:
    path = folder / MERGES
    vocab = read_json(folder / VOCAB)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line and line[:9] != "#version:"]
        merges = [(first, second) for first, second in (line.split(" ") for line in lines)]
        return hf.Tokenizer(hf.models.BPE(vocab, merges))
    except Exception as error:  # the library raises plain Exceptions
        raise RequestError(f"{path}: not the merges of {VOCAB} ({str(error).splitlines()[0]})") from None


def _add_listed(folder: Path, made: hf.Tokenizer, config: Mapping[str, Any], special: set[str | None]) -> None:
    """Adds the tokens that the folder lists with their ids."""
    listed = config.get("added_tokens_decoder")
    path = folder / (CONFIG_FILE if listed is not None else "added_tokens.json")
    try:
        if listed is not None:
            added = {int(number): hf.AddedToken(**token) for number, token in listed.items()}
        else:
            older = read_json(path) if path.is_file() else {}
            added = {
                int(number): hf.AddedToken(token, normalized=token not in special, special=token in special)
                for token, number in older.items()
            }
        for number, token in sorted(added.items()):
            (made.add_special_tokens if token.special else made.add_tokens)([token])
            if made.token_to_id(token.content) != number:
                raise ValueError(f"{token.content!r} has id {number}, which leaves a gap after the vocabulary")
    except (AttributeError, TypeError, ValueError) as error:
        raise RequestError(f"{path}: not a list of added tokens ({str(error).splitlines()[0]})") from None


def _add_specials(made: hf.Tokenizer, tokens: Sequence[Any], defaults: set[str]) -> None:
    """Makes `tokens` special; those that the vocabulary lacks get the next ids, as transformers gives them.

    A class's default that the vocabulary lacks is added only where an id after it depends on it: a model with its own
    vocabulary need not have it.
    """
    texts = [token_text(token) for token in tokens]
    missing = [i for i, text in enumerate(texts) if text is not None and made.token_to_id(text) is None]
    last = max((i for i in missing if texts[i] not in defaults), default=-1)
    for i, (text, token) in enumerate(zip(texts, tokens, strict=True)):
        if text is not None and (i <= last or i not in missing):
            flags = {name: token.get(name, False) for name in _FLAGS} if isinstance(token, Mapping) else {}
            made.add_special_tokens([hf.AddedToken(text, **({"normalized": False} | flags))])
