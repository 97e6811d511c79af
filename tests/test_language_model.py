"""What a user holds: likelihoods, logits and generation of one model, and the requests it refuses."""

import time
from dataclasses import replace
from unittest.mock import ANY

import jax
import numpy as np
import pytest

from polygpt import LanguageModel, PolygptError, RequestError, build, preset
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
    # The tokens are those of the text, which are bytes here.
    assert result.tokens == whole.tokens[: len(result.tokens)]
    assert lm.tokenizer.decode(result.tokens) == result.text
    assert lm.generate("ab", max_new_tokens=40, temperature=0, stop=word) == replace(result, tokens_per_second=ANY)


def test_a_list_of_prompts_gives_what_each_gives_alone(lm):
    settings = {"max_new_tokens": 12, "temperature": 0.9, "top_p": 0.95}
    prompts, seeds = ["ab", lm.tokenizer.encode("wörld"), "the cat sat on", np.array([97, 98])], [3, 4, 5, 3]
    alone = [lm.generate(prompt, seed=seed, **settings) for prompt, seed in zip(prompts, seeds, strict=True)]
    together = lm.generate(prompts, seed=seeds, **settings)
    assert [result.tokens for result in together] == [result.tokens for result in alone]
    assert [result.text for result in together] == [result.text for result in alone]
    assert together[0].tokens == together[3].tokens  # the same text as ids
    same = lm.generate([prompts[0], prompts[0]], seed=3, **settings)
    assert [result.tokens for result in same] == [alone[0].tokens] * 2
    assert len(lm.generate(["ab"], **settings)) == 1


def test_more_prompts_than_are_decoded_together(lm):
    prompts = ["ab" * (1 + i % 3) for i in range(19)]
    results = lm.generate(prompts, seed=range(19), max_new_tokens=3)
    assert results[17].tokens == lm.generate(prompts[17], seed=17, max_new_tokens=3).tokens


def test_a_model_without_tokenizer_generates_from_ids():
    bare = build(preset("giant", vocab_size=64, context_length=32, embed_dim=16, attention={"num_heads": 2}), seed=0)
    result = bare.generate([1, 2, 3], max_new_tokens=5, temperature=0)
    assert (result.text, len(result.tokens), result.finish_reason) == (None, 5, "length")
    stop = result.tokens[-1]
    stopped = bare.generate([1, 2, 3], max_new_tokens=5, temperature=0, stop_tokens=[stop])
    assert (stopped.tokens, stopped.finish_reason) == (result.tokens[: result.tokens.index(stop)], "stop")
    for asked in ({"prompt": "a"}, {"prompt": [1], "stop": "a"}, {"prompt": [1], "on_text": print}):
        with pytest.raises(RequestError, match="no tokenizer"):
            bare.generate(**asked)


def test_tokens_per_second_are_those_of_decoding(lm):
    assert lm.generate("ab", max_new_tokens=2).tokens_per_second > 0
    assert lm.generate("ab", max_new_tokens=2, beams=2).tokens_per_second is None


def test_tokens_per_second_of_the_first_call_count_no_compilation(lm):
    fresh = build(lm.config.replace(embed_dim=20), tokenizer=lm.tokenizer)  # no program is compiled for this size yet
    began = time.perf_counter()
    first = fresh.generate("ab", max_new_tokens=4)
    assert 4 / first.tokens_per_second < 0.2 * (time.perf_counter() - began)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda lm: lm.generate("a" * 65), "65"),
        (lambda lm: lm.generate("the cat " * 500_000), "at least 4000000 tokens, model.context_length is 64"),
        (lambda lm: lm.generate("a", temperature=-1.0), "temperature"),
        (lambda lm: lm.generate("a", seed=2**32), "seed"),
        (lambda lm: lm.generate("a", stop=[""]), "stop"),
        (lambda lm: lm.generate("a", stop=[1]), "stop"),
        (lambda lm: lm.generate("a", stop_tokens="a"), "stop_tokens"),
        (lambda lm: lm.generate("a", max_new_tokens=2.5), "max_new_tokens"),
        (lambda lm: lm.generate("a", seed="x"), "seed"),
        (lambda lm: lm.generate("a", seed=[1]), "single seed"),
        (lambda lm: lm.generate(["a", "b"], seed=[1]), "2 prompts"),
        (lambda lm: lm.generate(["a"], on_text=print), "on_text"),
        (lambda lm: lm.generate([{"role": "user", "content": "Hi"}]), "chat=True"),
        (lambda lm: lm.generate([1, "a"]), "prompt 0"),
        (lambda lm: lm.generate([[1, 2.5]]), "prompt 0"),
        (lambda lm: lm.generate([1.5, 2.5]), "prompt 0"),
        (lambda lm: lm.generate([[]]), "empty"),
        (lambda lm: lm.generate([]), "empty"),
        (lambda lm: lm.generate(5), "int"),
        (lambda lm: lm.generate(None), "None"),
        (lambda lm: lm.generate(b"ab"), "bytes"),
        (lambda lm: lm.generate([257]), "257"),
        (lambda lm: lm.generate([1], chat=True), "chat"),
        (lambda lm: lm.generate("ab", maxnewtokens=3), "maxnewtokens: no such setting; did you mean 'max_new_tokens'"),
        (lambda lm: lm.generate("ab", settings={}), r"settings: no such setting; (?!.*'settings')"),
        (lambda lm: lm.generate("ab", length_penalty=1.0), "beam search alone takes length_penalty: give beams as"),
        (lambda lm: lm.generate("ab", beams=2, min_new_tokens=3), "beam search takes no min_new_tokens: leave it out"),
        (lambda lm: lm.nll("a" * 65), "65"),
        (lambda lm: lm.nll(b"a"), "nll takes text, not b'a'"),
        (lambda lm: lm.nll(None), "nll takes text, not None"),
        (lambda lm: lm.logits([[1, 2], [3]]), "differ in length"),
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


def test_logits_that_are_not_finite_are_an_error(lm):
    damaged = LanguageModel(lm.config, jax.tree.map(lambda leaf: leaf * np.nan, lm.params), lm.tokenizer)
    for ask in (lambda: damaged.logits([[1, 2]]), lambda: damaged.nll("ab")):
        with pytest.raises(PolygptError, match="logits are not finite numbers"):
            ask()
