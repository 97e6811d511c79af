"""Training a tokenizer on text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from polygpt.errors import RequestError
from polygpt.tokenizers.bytelevel import BYTE_TO_CHAR
from polygpt.tokenizers.config import TokenizerConfig
from polygpt.tokenizers.encoding import PIECE_CHARS, refuse_surrogates
from polygpt.tokenizers.folder import load_tokenizer
from polygpt.tokenizers.structure import describe_structure
from polygpt.tokenizers.tokenizer import Tokenizer


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `config` describes; the same texts in the same order give the same one.

    The ids are the characters in order of code point (`char`), the 256 byte values (`byte`), or the byte alphabet
    followed by the merges in the order they were learned (`bpe`). Special tokens come last. `char` reads all `texts`,
    `bpe` those within `config.train_bytes`, `byte` none.

    Raises:
        RequestError: there is no text to train on, or the file is not a tokenizer.
        PolygptError: the hub cannot be reached.
    """
    if config.place is not None:
        return load_tokenizer(config.place)
    make = {"char": _char, "byte": _byte, "bpe": _bpe}[config.kind]
    made = make(config, texts)
    made.add_special_tokens(list(config.specials))
    return Tokenizer(made)


def _char(config: TokenizerConfig, texts: Iterable[str]) -> hf.Tokenizer:
    alphabet: set[str] = set()
    for text in _some(texts):
        alphabet.update(text)
    return character_tokenizer({char: i for i, char in enumerate(sorted(alphabet))})


def character_tokenizer(ids: dict[str, int]) -> hf.Tokenizer:
    """The tokenizer of kind `char` in which each character has its id."""
    # BPE without merges looks up one character at a time; WordLevel behind a split into characters gives the
    # same ids five to eight times slower.
    made = hf.Tokenizer(models.BPE(vocab=ids, merges=[]))
    made.decoder = decoders.Fuse()
    return made


def _byte(config: TokenizerConfig, texts: Iterable[str]) -> hf.Tokenizer:
    vocab = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
    made = hf.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def _bpe(config: TokenizerConfig, texts: Iterable[str]) -> hf.Tokenizer:
    made = hf.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - len(config.specials),
        min_frequency=2,  # a pair seen once says nothing of other text; the library would merge those too
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    structure = describe_structure(made, {})  # a long text is cut between words, so that its pieces take little memory
    limited = _some(first_bytes(texts, config.train_bytes))
    made.train_from_iterator((piece for text in limited for piece in structure.cut(text, PIECE_CHARS)), trainer)
    return made


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The first `limit` bytes of the texts in UTF-8; what comes after is not read."""
    for text in texts:
        refuse_surrogates(text)
        data = text.encode()
        if len(data) >= limit:
            yield data[:limit].decode(errors="ignore")  # without half a character at the end
            return
        yield text
        limit -= len(data)


def _some(texts: Iterable[str]) -> Iterator[str]:
    """`texts`, which must hold at least one character."""
    empty = True
    for text in texts:
        refuse_surrogates(text)
        empty = empty and not text
        yield text
    if empty:
        raise RequestError("there is no text to train a tokenizer on: the texts are empty")
