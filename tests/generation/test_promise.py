"""The promise, over the whole menu of parts: a request's text, ids and log probabilities are its own."""

import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from engines import SAMPLERS, forget

from polygpt.generation import Engine, Request, TextStream
from polygpt.model import Model
from polygpt.tokenizers import TokenizerConfig, train_tokenizer

MODELS = zoo.evaluated()
TOKENIZER = train_tokenizer(TokenizerConfig(kind="char"), [string.ascii_lowercase + string.digits])


def requests_of(count):
    random = np.random.default_rng(5)
    shared = random.integers(0, TOKENIZER.vocab_size, 11).tolist()
    for number in range(count):
        prompt = shared[: random.choice([0, 5, 11])] + random.integers(0, TOKENIZER.vocab_size, 1 + number % 3).tolist()
        sampler = SAMPLERS[number % len(SAMPLERS)]
        yield Request(prompt, int(random.integers(1, 12)), sampler, number, stop_tokens=(7,), logprobs=2)


def submit(engine, request):
    return engine.submit(request, TextStream(TOKENIZER.decode_after, request.prompt, ["xy", "q"]))


def outcome(handle):
    handle.result()
    return handle.text, handle.tokens, handle.logprobs, handle.finish_reason


@pytest.mark.parametrize("name", MODELS)
def test_a_request_gives_the_same_alone_and_among_others_with_any_cache(name):
    model = Model(MODELS[name])
    params = zoo.lively(model)
    engine = Engine(model, params, slots=3, chunk=4, queue=20, vocab_size=TOKENIZER.vocab_size)
    requests, alone = list(requests_of(9)), []
    for request in requests:
        forget(engine)
        alone.append(outcome(submit(engine, request)))
    leaver = engine.submit(Request([3, 1], 20, seed=4))
    handles = [submit(engine, request) for request in reversed(requests)]
    engine.step(2)
    leaver.cancel()
    assert [outcome(handle) for handle in handles] == alone[::-1]
    warm = [outcome(submit(engine, request)) for request in requests]
    assert warm == alone
    assert sum(len(tokens) for _, tokens, _, _ in alone) > 12

    rows = np.zeros((len(requests), zoo.LENGTH), int)
    for row, request, (_, tokens, _, _) in zip(rows, requests, alone, strict=True):
        row[: len(request.prompt) + len(tokens)] = [*request.prompt, *tokens]
    full = np.asarray(jax.nn.log_softmax(jax.jit(model.logits)(params, jnp.asarray(rows))))
    for row, scores, request, (_, tokens, logprobs, _) in zip(rows, full, requests, alone, strict=True):
        places = len(request.prompt) - 1 + np.arange(len(tokens))
        own = [each.logprob for each in logprobs]
        np.testing.assert_allclose(own, scores[places, row[places + 1]], rtol=0, atol=2e-5)
