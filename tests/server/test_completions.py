"""`/v1/completions` through the `openai` client: what the library gives for the same request, whole and as a stream."""

import openai
import pytest

PROMPT = "the cat sat"
SETTINGS = [
    {"max_tokens": 24, "seed": 3},
    {"max_tokens": 24, "seed": 5, "temperature": 0},
    {"max_tokens": 40, "seed": 1, "temperature": 0.7, "top_p": 0.9, "extra_body": {"top_k": 20, "min_p": 0.01}},
    {"max_tokens": 24, "seed": 2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"max_tokens": 24, "seed": 2, "extra_body": {"repetition_penalty": 1.3}, "logit_bias": {"7": 4, "0": -100}},
    {"max_tokens": 60, "seed": 4, "stop": ["t", "e"]},
    {"max_tokens": 60, "seed": 6, "stop": "a", "logprobs": 3},
]


def library(lm, prompt, settings):
    """The same request to `lm.generate`."""
    own = {**settings, **settings.get("extra_body", {})}
    own = {"temperature": 1.0, **own, "max_new_tokens": own["max_tokens"]}
    if "logit_bias" in own:
        own["logit_bias"] = {int(token): float(value) for token, value in own["logit_bias"].items()}
    for name in ("extra_body", "max_tokens"):
        own.pop(name, None)
    return lm.generate(prompt, **own)


def reason(generation):
    return "length" if generation.finish_reason == "context_length" else generation.finish_reason


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_answer_is_that_of_the_library_whole_and_as_a_stream(client, lm, settings):
    expected = library(lm, PROMPT, settings)
    whole = client.completions.create(model="tiny", prompt=PROMPT, **settings).choices[0]
    assert (whole.text, whole.finish_reason) == (expected.text, reason(expected))
    chunks = list(client.completions.create(model="tiny", prompt=PROMPT, stream=True, **settings))
    choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.text for choice in choices) == expected.text
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == [reason(expected)]
    if "logprobs" in settings:
        assert whole.logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        streamed = [value for choice in choices for value in choice.logprobs.token_logprobs]
        assert streamed == whole.logprobs.token_logprobs
        offsets = [at for choice in choices for at in choice.logprobs.text_offset]
        assert offsets == whole.logprobs.text_offset == sorted(offsets)
        lists = expected.tokens, expected.logprobs, expected.top_logprobs, whole.logprobs.top_logprobs
        for token, logprob, ours, top in zip(*lists, strict=True):
            values = list(dict([*ours, (token, logprob)]).values())  # the chosen one comes last if it is not among them
            assert list(top.values()) == pytest.approx(values, abs=1e-4)


def test_texts_and_ids_and_lists_of_either(client, lm):
    ids = lm.prompt_tokens(PROMPT)
    expected = lm.generate([PROMPT, "on"], max_new_tokens=9, seed=1, temperature=1.0)
    for prompt in ([PROMPT, "on"], [ids, lm.prompt_tokens("on")]):
        found = client.completions.create(model="tiny", prompt=prompt, max_tokens=9, seed=1)
        assert [choice.text for choice in found.choices] == [each.text for each in expected]
        assert [choice.index for choice in found.choices] == [0, 1]
        assert found.usage.prompt_tokens == len(ids) + 1
    one = client.completions.create(model="tiny", prompt=ids, max_tokens=9, seed=1)
    assert one.choices[0].text == expected[0].text


def test_several_choices_have_seeds_one_after_the_other(client, lm):
    seeds = (2**32 - 2, 2**32 - 1, 0)
    expected = [lm.generate(PROMPT, max_new_tokens=12, seed=seed, temperature=1.0).text for seed in seeds]
    found = client.completions.create(model="tiny", prompt=PROMPT, n=3, max_tokens=12, seed=2**32 - 2)
    assert [choice.text for choice in found.choices] == expected
    texts = ["", "", ""]
    for chunk in client.completions.create(model="tiny", prompt=PROMPT, n=3, max_tokens=12, seed=-2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_best_of_gives_those_with_the_highest_mean_log_probability(client, lm):
    samples = lm.generate(PROMPT, n=5, max_new_tokens=10, seed=0, temperature=1.0, logprobs=0)
    samples.sort(key=lambda sample: -sum(sample.logprobs) / max(len(sample.logprobs), 1))
    found = client.completions.create(model="tiny", prompt=PROMPT, n=2, best_of=5, max_tokens=10, seed=0)
    assert [choice.text for choice in found.choices] == [sample.text for sample in samples[:2]]
    assert found.usage.completion_tokens == sum(len(sample.tokens) for sample in samples)


def test_without_a_seed_answers_differ(client):
    texts = {client.completions.create(model="tiny", prompt=PROMPT, max_tokens=16).choices[0].text for _ in range(3)}
    assert len(texts) == 3


def test_an_echoed_prompt_has_the_log_probabilities_of_the_model(client, lm):
    ids = lm.prompt_tokens(PROMPT)
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2, seed=0, echo=True, logprobs=2)
    scores = found.choices[0].logprobs
    assert found.choices[0].text.startswith(PROMPT)
    assert scores.token_logprobs[0] is None
    assert scores.token_logprobs[1 : len(ids)] == pytest.approx((-lm.nll(PROMPT)).tolist(), abs=1e-4)
    assert len(scores.tokens) == len(ids) + 2 == len(scores.top_logprobs)
    assert "".join(scores.tokens[: len(ids)]) == PROMPT
    alone = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=2)
    assert alone.choices[0].text == PROMPT
    assert alone.choices[0].finish_reason == "length"
    assert alone.choices[0].logprobs.token_logprobs == scores.token_logprobs[: len(ids)]
    assert alone.usage.prompt_tokens == alone.usage.total_tokens == len(ids)
    stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, echo=True, stream=True)
    assert [(chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in stream] == [(PROMPT, "length")]
    stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2, seed=0, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == found.choices[0].text


def test_ids_of_tokens_if_asked(client, lm):
    expected = lm.generate(PROMPT, max_new_tokens=5, seed=1, temperature=1.0, logprobs=2)
    found = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=5, seed=1, logprobs=2, extra_body={"return_token_ids": True}
    ).choices[0]
    assert found.token_ids == expected.tokens
    content = found.logprobs.content
    assert [entry["id"] for entry in content] == expected.tokens
    best = [[top["id"] for top in entry["top_logprobs"]] for entry in content]
    assert best == [[token for token, _ in top] for top in expected.top_logprobs]
    assert bytes(byte for entry in content for byte in entry["bytes"]) == lm.tokenizer.decode_bytes(expected.tokens)


def test_beams_are_those_of_the_library(client, lm):
    expected = lm.generate(PROMPT, beams=4, n=2, max_new_tokens=8)
    found = client.completions.create(model="tiny", prompt=PROMPT, n=2, max_tokens=8, extra_body={"beams": 4})
    assert [choice.text for choice in found.choices] == [each.text for each in expected]
    assert found.usage.completion_tokens == sum(len(each.tokens) for each in expected)


@pytest.mark.parametrize("constraint", [{"regex": "[ab]{3,5}"}, {"grammar": 'start: ("x" | "yy")~2'}], ids=str)
def test_constraints_hold_beside_others(client, lm, constraint):
    pytest.importorskip("llguidance")
    expected = lm.generate(PROMPT, max_new_tokens=20, seed=3, temperature=1.0, **constraint)
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, seed=3, extra_body=constraint)
    assert found.choices[0].text == expected.text
    assert found.choices[0].finish_reason == expected.finish_reason == "stop"


def test_usage_and_what_was_cached(client, lm):
    prompt = "on the mat " * 30
    count = len(lm.prompt_tokens(prompt))
    first, again = (client.completions.create(model="tiny", prompt=prompt, max_tokens=3, seed=0) for _ in range(2))
    assert first.usage.prompt_tokens == again.usage.prompt_tokens == count
    assert first.usage.total_tokens == count + first.usage.completion_tokens
    assert again.usage.prompt_tokens_details.cached_tokens >= count // 64 * 64 > 0
    assert first.choices[0].text == again.choices[0].text
    chunks = list(
        client.completions.create(
            model="tiny", prompt=prompt, max_tokens=3, seed=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == first.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_full_context_ends_with_length(client, lm):
    ids = [5] * (lm.config.context_length - 3)
    found = client.completions.create(model="tiny", prompt=ids, max_tokens=9, logit_bias={"0": -100}, seed=1)
    assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("length", 3)
    full = client.completions.create(model="tiny", prompt=[5] * lm.config.context_length, max_tokens=9)
    assert (full.choices[0].text, full.choices[0].finish_reason) == ("", "length")


WRONG = [
    ({"prompt": "x " * 2000}, "prompt", "holds 1,024"),
    ({"prompt": "x " * 50_000}, "prompt", "at least"),
    ({"prompt": ""}, None, None),
    ({"prompt": []}, "prompt", "empty list"),
    ({"prompt": [[1], "x", 3]}, "prompt", "prompt 2"),
    ({"prompt": [10**6]}, "prompt", "vocabulary"),
    ({"prompt": ["x"] * 65}, "prompt", "limit of 64"),
    ({"prompt": "x", "temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"prompt": "x", "temperature": "hot"}, "temperature", "number"),
    ({"prompt": "x", "top_p": 0}, "top_p", None),
    ({"prompt": "x", "n": 17}, "n", "limit of 16"),
    ({"prompt": "x", "n": 13}, None, "12 in all"),
    ({"prompt": "x", "n": 3, "best_of": 2}, "best_of", "below n=3"),
    ({"prompt": "x", "best_of": 3, "stream": True}, "best_of", "streamed"),
    ({"prompt": "x", "max_tokens": 1025}, "max_tokens", "limit of 1,024"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens", "echo"),
    ({"prompt": "x", "logprobs": 21}, "logprobs", None),
    ({"prompt": "x", "stop": ["a"] * 17}, "stop", "takes 16"),
    ({"prompt": "x", "stop": [""]}, "stop", "empty"),
    ({"prompt": "x", "logit_bias": {"9999": 1}}, "logit_bias", "0..281"),
    ({"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias", None),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "goes with stream: true"),
    ({"prompt": "x", "stream_options": {}, "stream": False}, "stream_options", "goes with stream: true"),
    ({"prompt": "x", "repetition_penalty": 1e300}, "repetition_penalty", "less than or equal to 100"),
    ({"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
    ({"prompt": "x", "beams": 17}, "beams", "limit of 16"),
    ({"prompt": "x", "beams": 2, "top_p": 0.5}, "top_p", "beams"),
    ({"prompt": "x", "beams": 2, "n": 3}, "n", "at most 2"),
    ({"prompt": "x", "regex": "("}, "regex", None),
    ({"prompt": "x", "regex": "a", "grammar": "b"}, "regex", "one constraint"),
    ({"prompt": "x", "temprature": 1}, "temprature", "did you mean 'temperature'"),
    ({"prompt": "x", "max_new_tokens": 1}, "max_new_tokens", "max_tokens"),
]


@pytest.mark.parametrize(("body", "param", "said"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_said_with_the_field(client, body, param, said):
    if said is None and param is None:  # an empty prompt starts from the token that ends a text
        assert client.post("/completions", body={"model": "tiny", **body}, cast_to=object)
        return
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body={"model": "tiny", **body}, cast_to=object)
    error = caught.value.body
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert (said or "") in error["message"]
    assert "Traceback" not in error["message"]


def test_a_prompt_that_is_too_long_says_both_counts(client, lm):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[5] * 1500)
    assert caught.value.code == "context_length_exceeded"
    assert "1,500" in caught.value.message
    assert "1,024" in caught.value.message


def test_only_the_served_name_names_a_model(client):
    for name in ("tinny", "/etc/passwd", "../tiny"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model=name, prompt="x")
        assert caught.value.code == "model_not_found"
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_fields_of_openai_that_do_nothing_are_accepted(client):
    body = {"user": "me", "stream_options": {"include_obfuscation": True}}
    assert client.completions.create(model="tiny", prompt="x", max_tokens=1, stream=True, **body)
