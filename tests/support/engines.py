"""Engines that the tests of generation share, so that their programs are compiled once."""

import numpy as np
import zoo

from polygpt.generation import Engine, Request, Sampler
from polygpt.model import Model

LENGTH, CHUNK = 64, 8
KINDS = {
    "softmax": {},
    "local": {"attention": zoo.LOCAL},
    "linear": {"attention": zoo.LINEAR},
    "moe": {"feedforward": zoo.MOE},
    "soft_moe": {"feedforward": zoo.SOFT},
}
GREEDY = Sampler(temperature=0.0)
SAMPLERS = [
    GREEDY,
    Sampler(),
    Sampler(temperature=0.7, top_k=5),
    Sampler(temperature=1.3, top_p=0.8, repetition_penalty=1.3),
    Sampler(presence_penalty=0.5, frequency_penalty=0.3, min_new_tokens=5),
    Sampler(temperature=0.0, no_repeat_ngram=2, logit_bias={3: 2.0, 5: -100.0}),
]
ENGINES = {}


def engine_of(name):
    """One engine for all tests of a kind: its programs are compiled once."""
    if name not in ENGINES:
        model = Model(zoo.config_of(zoo.Case({"context_length": LENGTH, **KINDS[name]})))
        ENGINES[name] = Engine(model, zoo.lively(model), slots=8, chunk=CHUNK, queue=100)
    return ENGINES[name]


def requests_of(count):
    random = np.random.default_rng(3)
    shared = random.integers(0, zoo.VOCAB, 30).tolist()
    found = []
    for number in range(count):
        own = random.integers(0, zoo.VOCAB, random.integers(1, 8)).tolist()
        prompt = shared[: random.choice([0, 0, 9, 17, 30])] + own
        asked = {"sampler": SAMPLERS[number % len(SAMPLERS)], "seed": int(random.integers(2**32))}
        logprobs = [None, 0, 3][number % 3]
        found.append(Request(prompt, int(random.integers(1, 24)), stop_tokens=(7, 8), logprobs=logprobs, **asked))
    return found


def outcome(handle):
    handle.result()
    return handle.tokens, handle.logprobs, handle.finish_reason


def forget(engine):
    engine._runner.reader.forget()
