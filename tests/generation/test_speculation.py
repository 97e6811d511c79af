"""Speculation: the same ids with it and without, whatever is drafted."""

import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from polygpt.errors import RequestError
from polygpt.generation import Draft, Engine, Request, Sampler, as_grammar
from polygpt.generation.constraints import Constraint, Vocabulary
from polygpt.generation.speculation import DRAFTED, Lookup
from polygpt.model import Model

LENGTH = 64
GREEDY = Sampler(temperature=0.0)
SAMPLERS = [
    GREEDY,
    Sampler(temperature=0.3),
    Sampler(temperature=0.8, top_k=5),
    Sampler(temperature=0.0, repetition_penalty=1.3, no_repeat_ngram=3, logit_bias={3: 2.0}),
    Sampler(temperature=0.5, presence_penalty=0.5, frequency_penalty=0.3, min_new_tokens=9),
]


def made(seed=5, **changes):
    model = Model(zoo.config_of(zoo.Case({"context_length": LENGTH, **changes})))
    return model, zoo.lively(model, seed)


@pytest.fixture(scope="module")
def target():
    return made()


@pytest.fixture(scope="module")
def engines(target):
    """Without speculation, with look-up, with a draft that is the model itself, and with one that knows nothing."""
    model, params = target
    other, numbers = made(6, num_layers=1)
    drafts = {"none": None, "lookup": "lookup", "itself": Draft(model, params), "other": Draft(other, numbers)}
    return {name: Engine(model, params, slots=4, chunk=8, queue=100, draft=draft) for name, draft in drafts.items()}


def requests_of(count):
    rng = np.random.default_rng(2)
    found = []
    for number in range(count):
        piece = rng.integers(0, zoo.VOCAB, rng.integers(1, 6)).tolist()
        prompt = (piece * 20)[: rng.integers(1, 30)]
        asked = {"sampler": SAMPLERS[number % len(SAMPLERS)], "seed": number, "logprobs": [None, 2][number % 2]}
        found.append(Request(prompt, int(rng.integers(1, 40)), stop_tokens=(7,), **asked))
    return found


@pytest.mark.parametrize("name", ["lookup", "itself", "other"])
def test_ids_are_those_without_and_log_probabilities_nearly(engines, name):
    requests = requests_of(40)
    plain = [engines["none"].submit(request) for request in requests]
    drafted = [engines[name].submit(request) for request in requests]
    for own, handle in zip(plain, drafted, strict=True):
        own.result()
        handle.result()
        assert (handle.tokens, handle.finish_reason) == (own.tokens, own.finish_reason)
        for theirs, ours in zip(own.logprobs, handle.logprobs, strict=True):
            assert theirs.logprob == pytest.approx(ours.logprob, abs=1e-4)
            assert dict(theirs.top) == pytest.approx(dict(ours.top), abs=1e-4)
    found = engines[name].statistics
    assert found.drafted == sum(handle.drafted for handle in drafted) > 0
    assert found.accepted == sum(handle.accepted for handle in drafted)
    if name == "itself":
        assert found.accepted > 0.8 * found.drafted  # not all: drafts beyond the end of a request are counted
        assert found.steps < 0.4 * engines["none"].statistics.steps


def test_a_model_that_drafts_for_itself_is_always_right(engines):
    for sampler in SAMPLERS:
        before = engines["itself"].statistics
        handle = engines["itself"].submit(Request([1, 2, 3], 2 * (DRAFTED + 1), sampler, 4)).result()
        assert handle.accepted == handle.drafted == 2 * DRAFTED
        assert engines["itself"].statistics.steps - before.steps == 2


def test_neighbours_and_cancellations_change_no_id(engines):
    requests = requests_of(24)
    for name in ("lookup", "other"):
        alone = [engines[name].submit(request).result().tokens for request in requests]
        handles = {}
        for number in np.random.default_rng(0).permutation(24):
            handles[number] = engines[name].submit(requests[number])
            if number % 3 == 0:
                leaver = engines[name].submit(Request([1, 2] * 5, 40, GREEDY))
                engines[name].step()
                leaver.cancel()
        assert [handles[number].result().tokens for number in range(24)] == alone


def test_constraints_go_along_with_guessing_neighbours(engines):
    """Ids 0 to 25 are letters here."""
    vocabulary = Vocabulary([bytes([97 + token % 26]) for token in range(zoo.VOCAB)], [], None, list)
    pytest.importorskip("llguidance")
    constraint = Constraint(vocabulary, as_grammar(regex="[a-c]{5,20}"))
    requests = [Request([1, 2] * 6, 30, GREEDY, seed, constraint=constraint if seed % 2 else None) for seed in range(6)]
    plain = [engines["none"].submit(request) for request in requests]
    drafted = [engines["lookup"].submit(request) for request in requests]
    assert [handle.result().tokens for handle in drafted] == [handle.result().tokens for handle in plain]


def test_look_up_guesses_what_followed_and_pauses_where_it_is_wrong():
    lookup = Lookup([1, 2, 3, 4, 5, 9, 1, 2, 3], 64)
    assert lookup.draft(3) == [4, 5, 9]
    assert lookup.draft(9) == [4, 5, 9, 1, 2, 3, 4, 5, 9]  # goes round
    lookup.extend([7])
    assert lookup.draft(3) == []
    lookup.extend([3, 4])
    assert lookup.draft(2) == [5, 9]  # two tokens suffice
    assert Lookup([1], 8).draft(3) == Lookup([], 8).draft(3) == []
    assert Lookup([0, 256, 0, 1, 256, 0], 8).draft(1) == [1]  # tokens, not bytes
    pauses = []
    for _ in range(8):
        lookup.judge(3, 0, 4)
        pauses.append(lookup.pause)
        while lookup.pause:
            lookup.judge(0, 0, 1)
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 64]
    lookup.judge(3, 1, 2)
    lookup.judge(3, 0, 1)
    assert lookup.pause == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention": zoo.LOCAL}, "attention local of the model"),
        ({"attention": zoo.LINEAR}, "attention linear of the model"),
        ({"feedforward": zoo.SOFT}, "feedforward soft_moe of the model"),
    ],
)
def test_a_state_that_cannot_go_back_is_refused(target, changes, words):
    model, params = made(**changes)
    with pytest.raises(RequestError, match=words):
        Engine(model, params, draft="lookup")
    with pytest.raises(RequestError, match=words.replace("the model", "the draft")):
        Engine(*target, draft=Draft(model, params))
    with pytest.raises(RequestError, match="draft must be"):
        Engine(*target, draft="guess")


def test_a_draft_that_does_not_fit_is_refused(target):
    for changes, word in (({"context_length": 32}, "32 tokens"), ({"vocab_size": 20}, "20 ids")):
        with pytest.raises(RequestError, match=word):
            Engine(*target, draft=Draft(*made(**changes)))


def test_a_draft_may_have_more_ids_than_the_tokenizer(target):
    model, params = target
    wide, numbers = made(num_layers=1, vocab_size=50)
    engine = Engine(model, params, slots=4, chunk=8, draft=Draft(wide, numbers))
    plain = Engine(model, params, slots=4, chunk=8)
    request = Request([1, 2, 3], 20, Sampler(), 3)
    assert engine.submit(request).result().tokens == plain.submit(request).result().tokens


def test_damaged_numbers_of_a_draft_do_no_harm(target):
    model, params = target
    broken = params | {"embedding": jnp.full_like(params["embedding"], jnp.nan)}
    engine = Engine(model, params, slots=4, chunk=8, draft=Draft(model, broken))
    handle = engine.submit(Request([1, 2, 3], 10, GREEDY)).result()
    assert handle.tokens == Engine(model, params, slots=4, chunk=8).submit(handle.request).result().tokens
