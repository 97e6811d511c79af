"""Baselines against their definitions."""

import gzip
import lzma
from itertools import pairwise

import numpy as np
import pytest

from polygpt.data import DataConfig, open_source, prepare
from polygpt.evaluation import bigram_bits_per_byte, gzip_bits_per_byte, held_out_text, xz_bits_per_byte
from polygpt.tokenizers import TokenizerConfig, train_tokenizer


@pytest.fixture
def prepared(tmp_path):
    def make(text, kind="byte", **settings):
        path = tmp_path / "text.txt"
        path.write_text(text)
        config = DataConfig(path=str(path), split="fraction", validation_fraction=0.25, **settings)
        tokenizer = train_tokenizer(TokenizerConfig(kind=kind), [text])
        return prepare(open_source(config), tokenizer, tmp_path / "shards", config), tokenizer

    return make


def test_the_held_out_text_is_what_was_held_out(prepared):
    text = "héllo wörld, " * 40
    shards, tokenizer = prepared(text)
    assert held_out_text(shards, tokenizer) == text[int(len(text) * 0.75) :].encode()


def test_compressors_count_all_their_bytes():
    text = b"abcabcabc" * 50
    assert gzip_bits_per_byte(text) == 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)
    assert xz_bits_per_byte(text) == 8 * len(lzma.compress(text, preset=9)) / len(text)


def test_bigram_counts_by_the_smoothed_equation(prepared):
    shards, _ = prepared("abracadabra " * 12 + "zebra", kind="char")
    train = shards.train.read(0, shards.train.tokens)
    held_out = shards.validation.read(0, shards.validation.tokens)
    vocab = shards.manifest.vocab_size

    def unigram(b):
        seen = len(set(train.tolist()))
        return ((train == b).sum() + seen / vocab) / (len(train) + seen)

    def bigram(a, b):
        after = train[1:][train[:-1] == a]
        followers = len(set(after.tolist()))
        if not len(after):
            return unigram(b)
        return ((after == b).sum() + followers * unigram(b)) / (len(after) + followers)

    bits = -sum(np.log2(bigram(a, b)) for a, b in pairwise(held_out))
    assert bigram_bits_per_byte(shards) == pytest.approx(bits / shards.validation.bytes)
    assert sum(bigram(train[0], b) for b in range(vocab)) == pytest.approx(1)
