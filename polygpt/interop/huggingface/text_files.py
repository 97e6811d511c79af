"""What lies beside the weights: tokenizer, end-of-text ids, chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers as hf

from polygpt.errors import RequestError
from polygpt.interop.settings import LIMIT, Settings, read_json
from polygpt.tokenizers import Tokenizer, load_tokenizer

TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer.json, or GPT-2's vocab.json and merges.txt, or None.

    Raises:
        RequestError: there is one and it cannot be used.
    """
    if (folder / TOKENIZER).is_file():
        return load_tokenizer(folder)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocab.is_file() and merges.is_file()):
        return None
    return load_byte_level_bpe(vocab, merges)


def load_byte_level_bpe(vocab: Path, merges: Path) -> Tokenizer:
    """GPT-2's tokenizer from its two files (Radford et al. 2019); its last token ends a text.

    Raises:
        RequestError: a file is not what its name says.
    """
    ids = read_json(vocab)
    try:
        lines = [line for line in merges.read_text(encoding="utf-8").split("\n") if line and line[:9] != "#version:"]
        pairs = [(first, second) for first, second in (line.split(" ") for line in lines)]
        tokenizer = hf.Tokenizer(hf.models.BPE(ids, pairs))
    except Exception as error:  # the library raises plain Exceptions
        raise RequestError(f"{merges}: not the merges of {vocab.name} ({str(error).splitlines()[0]})") from None
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token in ids if token.startswith("<|") and token.endswith("|>")])
    return Tokenizer(tokenizer)


def read_stop_tokens(folder: Path, settings: Settings) -> tuple[int, ...]:
    """The ids that end a text: those of generation_config.json, or else of config.json."""
    path = folder / GENERATION
    value = read_json(path).get("eos_token_id") if path.is_file() else None
    value = settings.get("eos_token_id") if value is None else value
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if type(v) is int and v >= 0)


def read_chat_template(folder: Path) -> str | None:
    """The template of chat_template.jinja or of tokenizer_config.json."""
    path = folder / CHAT_TEMPLATE
    if path.is_file():
        if path.stat().st_size > LIMIT:
            raise RequestError(f"{path}: {path.stat().st_size:,} bytes is too much for a template")
        return path.read_text(encoding="utf-8", errors="replace")
    path = folder / TOKENIZER_CONFIG
    template = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def write_text_files(folder: Path, tokenizer: Tokenizer, context_length: int, stop_tokens: tuple[int, ...]) -> None:
    """Writes the tokenizer and what transformers wants to know of it."""
    tokenizer.save(folder / TOKENIZER)
    names = {number: token for token, number in tokenizer.special_tokens.items()}
    end = names.get(tokenizer.end_of_text)
    first = names.get(tokenizer.start[0]) if tokenizer.start else None
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "bos_token": first or end,
    }
    write_json(folder / TOKENIZER_CONFIG, {name: value for name, value in settings.items() if value is not None})
    stops = [*dict.fromkeys([*stop_tokens, *([] if tokenizer.end_of_text is None else [tokenizer.end_of_text])])]
    if stops:
        bos = tokenizer.start[0] if tokenizer.start else stops[0]
        ids = {"eos_token_id": stops if len(stops) > 1 else stops[0], "bos_token_id": bos}
        write_json(folder / GENERATION, ids)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
