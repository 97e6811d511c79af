"""A tokenizer as the metadata of a GGUF file, or the reason why llama.cpp has no counterpart."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers as hf

from polygpt.errors import RequestError
from polygpt.tokenizers.gguf_reading import ENDS, NO_MERGE, PADDING, PREFIX, ROLES, spell
from polygpt.tokenizers.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from polygpt.tokenizers.sentencepiece import SPACE, PieceKind, score_bpe
from polygpt.tokenizers.tokenizer import Tokenizer

_INSTEAD = "export without the tokenizer"


def write_gguf_text(
    tokenizer: Tokenizer | None, vocab_size: int, stop_tokens: Sequence[int], chat_template: str | None
) -> dict[str, Any]:
    """The metadata that say how text becomes `vocab_size` ids; an id without a token gets one for padding.

    GGUF holds three of `stop_tokens`; llama.cpp finds others by their usual names.

    Raises:
        RequestError: llama.cpp would give other ids; what it lacks is named.
    """
    template = {} if chat_template is None else {"tokenizer.chat_template": chat_template}
    if tokenizer is None:
        return {f"{PREFIX}model": "none"} | template
    if tokenizer.vocab_size > vocab_size:
        raise RequestError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {vocab_size}")
    if len(tokenizer.start) > 1:
        raise RequestError(f"GGUF puts one token before a text; this tokenizer has {len(tokenizer.start)}; {_INSTEAD}")
    roles = {key: tokenizer.role(role) for role, key in ROLES.items()}
    named = [roles["eos_token_id"], *stop_tokens]
    stops = [*dict.fromkeys(end for end in named if end is not None)]
    stops = stops or [end for end in (tokenizer.end_of_text,) if end is not None]
    if not stops:
        # llama.cpp would take id 11 for one, whatever that is.
        raise RequestError(
            "llama.cpp needs a token that ends a text, and this tokenizer has none;\n"
            f"train it with special_tokens: [<|endoftext|>], or {_INSTEAD}"
        )
    spec = json.loads(tokenizer.to_json())
    tokens, kinds = _tokens(spec, tokenizer, vocab_size)
    write = _write_scores if _is_sentencepiece(spec) else _write_byte_level
    values = {
        **write(spec, tokenizer, tokens, kinds),
        "tokens": tokens,
        "token_type": [int(kind) for kind in kinds],
        "add_bos_token": bool(tokenizer.start),
        **{key: number for key, number in roles.items() if number is not None},
        **dict(zip(ENDS, stops, strict=False)),
        "bos_token_id": next(i for i in (*tokenizer.start, roles["bos_token_id"], stops[0]) if i is not None),
    }
    return {PREFIX + name: value for name, value in values.items()} | template


def _tokens(spec: Mapping[str, Any], tokenizer: Tokenizer, size: int) -> tuple[list[str], list[PieceKind]]:
    """The token of each id, in GGUF's spelling, and its kind."""
    vocab = spec["model"]["vocab"]
    if not isinstance(vocab, dict):
        raise RequestError(f"GGUF has no tokenizer of kind '{tokenizer.kind}'; {_INSTEAD}")
    tokens = [PADDING.format(i) for i in range(size)]
    kinds = [PieceKind.UNUSED] * size
    for token, number in vocab.items():
        tokens[number] = spell(token) if tokenizer.kind == "char" else token
        kinds[number] = PieceKind.NORMAL
    for token in spec["added_tokens"]:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = PieceKind.CONTROL if token["special"] else PieceKind.USER_DEFINED
    return tokens, kinds


def _is_sentencepiece(spec: Mapping[str, Any]) -> bool:
    return spec["model"].get("type") == "BPE" and SPACE in json.dumps(spec["normalizer"], ensure_ascii=False)


def _write_byte_level(
    spec: Mapping[str, Any], tokenizer: Tokenizer, tokens: Sequence[str], kinds: Sequence[PieceKind]
) -> dict[str, Any]:
    if tokenizer.kind == "char":
        name, merges = "gpt-2", _spelling_merges(tokens, kinds)
    elif tokenizer.kind == "byte":
        name, merges = "gpt-2", []
    else:
        name, merges = _pre_tokenizer(spec, tokenizer.kind), [_merge(merge) for merge in spec["model"]["merges"]]
    return {"model": "gpt2", "pre": name, "merges": merges or [NO_MERGE], "add_space_prefix": False}


def _merge(merge: Any) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _spelling_merges(tokens: Sequence[str], kinds: Sequence[PieceKind]) -> list[str]:
    """Merges that join the bytes of each character: the first bytes of one character never occur in another."""
    normal = [token for token, kind in zip(tokens, kinds, strict=True) if kind == PieceKind.NORMAL]
    merges = (f"{token[:end]} {token[end]}" for token in normal for end in range(1, len(token)))
    return [*dict.fromkeys(merges)]


def _pre_tokenizer(spec: Mapping[str, Any], kind: str) -> str:
    """The name under which llama.cpp splits text as this tokenizer does."""
    model = spec["model"]
    plain = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "byte_fallback": False}
    odd = next((name for name, value in plain.items() if model.get(name) not in (value, "")), None)
    if model.get("type") != "BPE" or odd is not None:
        what = f"of kind '{kind}'" if odd is None else f"with {odd}={model[odd]!r}"
        raise RequestError(f"GGUF has no tokenizer {what}; {_INSTEAD}")
    own = _splitting(spec)
    for name, pre in PRE_TOKENIZERS.items():
        if pre.ignore_merges == bool(model.get("ignore_merges")) and _applied(pre) == own:
            return name
    raise RequestError(
        "GGUF has no name for how this tokenizer splits text (normalizer and pre_tokenizer of its tokenizer.json); "
        f"{_INSTEAD}"
    )


def _applied(pre: PreTokenizer) -> tuple[Any, Any]:
    made = hf.Tokenizer(hf.models.BPE())
    pre.apply(made)
    return _splitting(json.loads(made.to_str()))


def _splitting(spec: Mapping[str, Any]) -> tuple[Any, Any]:
    """The parts of a tokenizer.json that decide where a text is split."""

    def plain(part: Any) -> Any:
        if isinstance(part, list):
            return [plain(entry) for entry in part]
        if not isinstance(part, dict):
            return part
        return {key: plain(value) for key, value in part.items() if key != "trim_offsets"}  # changes offsets, not ids

    return plain(spec["normalizer"]), plain(spec["pre_tokenizer"])


def _write_scores(
    spec: Mapping[str, Any], tokenizer: Tokenizer, tokens: list[str], kinds: list[PieceKind]
) -> dict[str, Any]:
    """SentencePiece's scores from the order of the merges, checked by deriving the merges from them again."""
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in spec["model"]["merges"]]
    ranks = {piece: rank for rank, piece in reversed([*enumerate(a + b for a, b in merges)])}
    scores = [-float(ranks.get(token, len(merges) + i)) for i, token in enumerate(tokens)]
    unknown = spec["model"].get("unk_token")
    for i, token in enumerate(tokens):
        if token == unknown:
            kinds[i] = PieceKind.UNKNOWN
        elif len(token) == 6 and token.startswith("<0x"):
            kinds[i] = PieceKind.BYTE
    prefix = "Prepend" in json.dumps(spec["normalizer"])
    again = json.loads(score_bpe(tokens, scores, kinds, space_prefix=prefix).to_str())
    same = _groups(again["model"]["merges"]) == _groups(merges) and _splitting(again) == _splitting(spec)
    if not same or again["model"]["byte_fallback"] != spec["model"].get("byte_fallback"):
        raise RequestError(f"no scores reproduce this tokenizer's merges, as GGUF requires; {_INSTEAD}")
    values = {"model": "llama", "scores": scores, "add_space_prefix": prefix}
    return values | ({"unknown_token_id": tokens.index(unknown)} if unknown in tokens else {})


def _groups(merges: Sequence[Any]) -> list[tuple[str, set]]:
    """The pieces in the order in which they are merged, each with all its cuts."""
    groups = itertools.groupby(map(tuple, merges), key="".join)
    return [(piece, set(ways)) for piece, ways in groups]
