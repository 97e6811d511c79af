"""Baselines: a bigram model and two compressors, in bits per byte of the same held-out text."""

from __future__ import annotations

import gzip
import lzma

import numpy as np

from polygpt.data import Shards
from polygpt.tokenizers import Tokenizer


def gzip_bits_per_byte(text: bytes) -> float:
    """`gzip -9` of `text`, its header included."""
    return 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)


def xz_bits_per_byte(text: bytes) -> float:
    """`xz -9` of `text`, its header included."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def bigram_bits_per_byte(shards: Shards) -> float:
    """The bigram model of the training tokens on the held-out ones, estimated in closed form.

    p(b|a) = (count(a, b) + followers(a)·p(b)) / (count(a) + followers(a)), where followers(a) is the number of
    distinct tokens seen after a, and p(b) is the same with unigrams over the uniform distribution (Witten & Bell
    1991, method C, as in Chen & Goodman 1998). No trained table of logits does better than these counts.
    """
    from scipy import sparse  # takes 0.2 s to import

    vocab = shards.manifest.vocab_size
    train = shards.train.read(0, shards.train.tokens)
    held_out = shards.validation.read(0, shards.validation.tokens)
    ones = np.ones(len(train) - 1)
    pairs = sparse.coo_array((ones, (train[:-1], train[1:])), shape=(vocab, vocab)).tocsr()
    after, followers = pairs.sum(axis=1), np.diff(pairs.indptr)
    unigrams = np.bincount(train, minlength=vocab).astype(float)
    seen = np.count_nonzero(unigrams)
    unigram = (unigrams + seen / vocab) / (len(train) + seen)
    first, second = held_out[:-1], held_out[1:]
    counts = np.asarray(pairs[first, second]).ravel()
    denominator = after[first] + followers[first]
    # A token never seen in training (or only at its end) has no followers: there the unigrams decide alone.
    mixed = (counts + followers[first] * unigram[second]) / np.maximum(denominator, 1)
    probability = np.where(denominator > 0, mixed, unigram[second])
    return float(-np.log2(probability).sum() / shards.validation.bytes)


def held_out_text(shards: Shards, tokenizer: Tokenizer) -> bytes:
    """The held-out text as it was, from its tokens; documents follow each other with nothing between."""
    split = shards.validation
    documents = (split.document(i) for i in range(split.documents))
    return b"".join(tokenizer.decode_bytes(ids[ids != shards.manifest.end_of_text]) for ids in documents)
