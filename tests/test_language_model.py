"""What a user holds: likelihoods, logits and generation of one model, and the requests it refuses."""

import jax
import numpy as np
import pytest

from polygpt import RequestError, build, preset
from polygpt.tokenizers import TokenizerConfig, train_tokenizer


@pytest.fixture(scope="module")
def lm():
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), [])
    config = preset(
        "giant",
        context_length=64,
        embed_dim=16,
        attention={"num_heads": 2},
        feedforward={"mlp_dim": 8},
        compute_dtype="float32",
    )
    return build(config, seed=1, tokenizer=tokenizer)


def test_an_open_vocabulary_is_the_tokenizers(lm):
    assert lm.config.vocab_size == lm.tokenizer.vocab_size == 257
    assert lm.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(lm.params))


def test_likelihoods_are_those_of_the_logits(lm):
    ids = lm.tokenizer.encode("Hello, wörld")
    nll = lm.nll("Hello, wörld")
    logits = np.asarray(lm.logits(np.asarray([ids])), np.float64)[0]
    expected = np.log(np.exp(logits).sum(-1))[:-1] - logits[np.arange(len(ids) - 1), ids[1:]]
    assert nll.shape == (len(ids) - 1,)
    np.testing.assert_allclose(nll, expected, rtol=1e-4)


def test_streamed_pieces_join_to_the_text(lm):
    pieces = []
    result = lm.generate("ab", max_new_tokens=50, seed=3, on_text=pieces.append)
    assert "".join(pieces) == result.text
    assert result.text == lm.tokenizer.decode(result.tokens)
    assert result.finish_reason in ("length", "stop")


def test_a_stop_string_ends_the_text_before_it(lm):
    whole = lm.generate("ab", max_new_tokens=40, temperature=0)
    word = whole.text[3:5]
    pieces = []
    result = lm.generate("ab", max_new_tokens=40, temperature=0, stop=[word], on_text=pieces.append)
    assert result.text == whole.text[: whole.text.index(word)] == "".join(pieces)
    assert result.finish_reason == "stop"


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda lm: lm.generate("a" * 65), "65"),
        (lambda lm: lm.generate("a", temperature=-1.0), "temperature"),
        (lambda lm: lm.generate("a", seed=2**32), "seed"),
        (lambda lm: lm.generate("a", stop=[""]), "stop"),
        (lambda lm: lm.nll("a" * 65), "65"),
        (lambda lm: lm.logits(np.zeros((1, 3))), "integers"),
        (lambda lm: lm.logits(np.asarray([[257]])), "256"),
        (lambda lm: build(preset("giant")), "vocab_size"),
        (lambda lm: build("giant"), "ModelConfig"),
        (lambda lm: build(preset("giant", vocab_size=64)).tokenizer, "no tokenizer"),
    ],
)
def test_what_cannot_be_is_refused_by_name(lm, call, word):
    with pytest.raises(RequestError, match=word):
        call(lm)
