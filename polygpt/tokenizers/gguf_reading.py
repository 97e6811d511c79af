"""The tokenizer of a GGUF file: byte-level BPE (`gpt2`) or SentencePiece's BPE (`llama`)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers as hf

from polygpt.errors import RequestError, suggest
from polygpt.settings import Settings
from polygpt.tokenizers.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from polygpt.tokenizers.sentencepiece import PieceKind, add_tokens, put_before, score_bpe
from polygpt.tokenizers.tokenizer import Tokenizer
from polygpt.tokenizers.train import character_tokenizer

PREFIX = "tokenizer.ggml."
# llama.cpp requires at least one merge. This one never applies: no token is called that.
NO_MERGE = "<none> <none>"
PADDING = "[PAD{}]"  # the token of an id that has none
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
ROLES = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
_ADDED = (PieceKind.UNKNOWN, PieceKind.CONTROL, PieceKind.USER_DEFINED)
_BYTE_LEVEL = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


class GGUFText(NamedTuple):
    """What the metadata of a file say about text."""

    tokenizer: Tokenizer | None
    stop_tokens: tuple[int, ...]
    chat_template: str | None


def read_gguf_text(metadata: Mapping[str, Any], where: str) -> GGUFText:
    """The tokenizer (None if the file says that it has none), the ids that end a text, the chat template.

    Raises:
        RequestError: the tokenizer is damaged or of an unknown kind; the key is named.
    """
    own = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    settings = Settings(own, where, PREFIX)
    template = metadata.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    kind = settings.take("model", str, "none")
    if kind in ("none", "no_vocab"):
        return GGUFText(None, (), template)
    if kind not in _KINDS:
        raise settings.error(f"'model' is {kind!r}, an unknown kind of tokenizer; {suggest(kind, _KINDS)}")
    vocabulary = _vocabulary(settings)
    made = _KINDS[kind](settings, vocabulary)
    settings.ignore("add_eos_token", "add_sep_token", "add_space_prefix", "token_type_count", "scores", "pre")
    settings.ignore("remove_extra_whitespaces")  # of byte-level BPE
    settings.ignore(*(name for name in own if name.endswith("_token_id")))
    settings.finish()
    ids = range(len(vocabulary.tokens))
    ends = (settings.take(name, int, None) for name in ENDS)
    roles = {role: settings.take(key, int, None) for role, key in ROLES.items()}
    try:
        return GGUFText(Tokenizer(made, roles), tuple(dict.fromkeys(end for end in ends if end in ids)), template)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None


class _Vocabulary(NamedTuple):
    tokens: list[str]
    kinds: list[int]  # a `PieceKind` each


def _vocabulary(settings: Settings) -> _Vocabulary:
    tokens = _list(settings, "tokens", str)
    kinds = _list(settings, "token_type", int, [PieceKind.NORMAL] * len(tokens))
    if len(kinds) != len(tokens):
        raise settings.error(f"'token_type' has {len(kinds)} entries for {len(tokens)} tokens")
    strange = next((kind for kind in kinds if kind not in set(PieceKind)), None)
    if strange is not None:
        raise settings.error(f"'token_type' has an entry {strange}, an unknown kind")
    # The ids that pad a vocabulary to a round number have no token here.
    while tokens and kinds[-1] == PieceKind.UNUSED and tokens[-1] == PADDING.format(len(tokens) - 1):
        del tokens[-1], kinds[-1]
    if len(set(tokens)) < len(tokens):
        raise settings.error(f"'tokens' has {Counter(tokens).most_common(1)[0][0]!r} twice")
    if not tokens:
        raise settings.error("'tokens' is empty")
    return _Vocabulary(tokens, kinds)


def _list(settings: Settings, name: str, kind: type, default: list | None = None) -> list:
    value = settings.get(name, default)
    if value is None:
        raise settings.error(f"the setting '{name}' is missing")
    if not isinstance(value, list) or not all(isinstance(entry, kind) for entry in value):
        raise settings.error(f"'{name}' is not a list of {'texts' if kind is str else 'numbers'}")
    return list(value)


def _start(settings: Settings, vocabulary: _Vocabulary, default: bool) -> int | None:
    """The id that is put before a text, if any."""
    number = settings.take("bos_token_id", int, None)
    if not settings.take("add_bos_token", bool, default) or number is None:
        return None
    if not 0 <= number < len(vocabulary.tokens):
        raise settings.error(f"'bos_token_id' is {number}, but there are {len(vocabulary.tokens)} tokens")
    return number


def _sentencepiece(settings: Settings, vocabulary: _Vocabulary) -> hf.Tokenizer:
    scores = _list(settings, "scores", float)
    if len(scores) < len(vocabulary.tokens) or not all(map(math.isfinite, scores)):
        raise settings.error("'scores' must be one finite number for each token")
    settings.require("remove_extra_whitespaces", False, "text normalisation is not supported")
    settings.require("precompiled_charsmap", None, "text normalisation is not supported")
    settings.ignore("merges")  # written by a few converters; they follow from the scores
    kinds = list(vocabulary.kinds)
    unknown = settings.take("unknown_token_id", int, 0)
    if PieceKind.UNKNOWN not in kinds and 0 <= unknown < len(kinds):
        kinds[unknown] = PieceKind.UNKNOWN
    prefix = settings.take("add_space_prefix", bool, True)
    start = _start(settings, vocabulary, default=True)
    try:
        return score_bpe(vocabulary.tokens, scores, kinds, space_prefix=prefix, start=start)
    except RequestError as error:
        raise RequestError(f"{settings.where}: {error}") from None


def _byte_level(settings: Settings, vocabulary: _Vocabulary) -> hf.Tokenizer:
    name = settings.take("pre", str, "default")
    if name not in PRE_TOKENIZERS:
        raise settings.error(f"'pre' is {name!r}, an unknown way of splitting text; known: {_KNOWN}")
    pre = PRE_TOKENIZERS[name]
    merges = [_pair(settings, merge) for merge in _list(settings, "merges", str) if merge != NO_MERGE]
    characters = _characters(vocabulary)
    try:
        made = character_tokenizer(characters) if characters else _bpe(vocabulary, merges, pre)
    except Exception as error:  # the library raises plain Exceptions
        raise settings.error(f"'merges' do not fit the tokens ({str(error).splitlines()[0]})") from None
    add_tokens(made, *vocabulary)
    start = _start(settings, vocabulary, default=pre.start)
    if start is not None:
        put_before(made, vocabulary.tokens[start], start)
    return made


def _bpe(vocabulary: _Vocabulary, merges: Sequence[tuple[str, str]], pre: PreTokenizer) -> hf.Tokenizer:
    # Special tokens at the end are added beside the model's vocabulary, as training a tokenizer does.
    merged = {"", *(part for first, second in merges for part in (first, second, first + second))}
    size = len(vocabulary.tokens)
    while size and vocabulary.kinds[size - 1] in _ADDED and vocabulary.tokens[size - 1] not in merged:
        size -= 1
    vocab = {token: i for i, token in enumerate(vocabulary.tokens[:size])}
    made = hf.Tokenizer(hf.models.BPE(vocab, list(merges), ignore_merges=pre.ignore_merges))
    pre.apply(made)
    if not merges:  # then splitting changes nothing; kind `byte` does without
        made.pre_tokenizer = _BYTE_LEVEL
    made.decoder = hf.decoders.ByteLevel()
    return made


def _pair(settings: Settings, merge: str) -> tuple[str, str]:
    first, blank, second = merge[1:].partition(" ")
    if not blank or not second:
        raise settings.error(f"'merges' has {merge!r}, which is not two tokens separated by a space")
    return merge[:1] + first, second


def _characters(vocabulary: _Vocabulary) -> dict[str, int] | None:
    """The ids of characters, if every token is one and not every byte has a token: that is kind `char`."""
    normal = [i for i, kind in enumerate(vocabulary.kinds) if kind == PieceKind.NORMAL]
    spelled = {vocabulary.tokens[i]: i for i in normal}
    if not normal or max(map(len, spelled)) > 4 or spelled.keys() >= set(hf.pre_tokenizers.ByteLevel.alphabet()):
        return None
    decoder = hf.decoders.ByteLevel()
    found = {decoder.decode([token]): i for token, i in spelled.items()}
    exact = all(len(char) == 1 and spell(char) in spelled for char in found) and len(found) == len(spelled)
    return found if exact else None


def spell(text: str) -> str:
    """`text` in the alphabet of byte-level BPE."""
    return "".join(piece for piece, _ in _BYTE_LEVEL.pre_tokenize_str(text))


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}
_KNOWN = ", ".join(PRE_TOKENIZERS)
