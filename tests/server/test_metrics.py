"""The counters are exact: after known requests each has a known value."""

import openai
import pytest
import serving
from prometheus_client.parser import text_string_to_metric_families


def read(live):
    """Every sample by its name and labels."""
    raw = live.raw(b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
    head, _, text = raw.partition(b"\r\n\r\n")
    assert b"text/plain" in head
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels) if name != "le")): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


@pytest.fixture
def fresh(lm):
    with serving.running({"a": lm, "b": lm}, slots=2, queue=2) as live:
        yield live


def test_counters_are_exact(fresh, lm):
    client, prompt = fresh.client(), "on the mat " * 30
    count, short = len(lm.prompt_tokens(prompt)), len(lm.prompt_tokens("x"))
    for seed in range(3):
        client.completions.create(model="a", prompt=prompt, max_tokens=4, seed=seed, logit_bias=endless(lm))
    several = client.completions.create(model="a", prompt="x", n=2, max_tokens=5, seed=0, logit_bias=endless(lm))
    assert several.usage.completion_tokens == 10
    list(client.completions.create(model="a", prompt="x", max_tokens=1, stream=True, logit_bias=endless(lm)))
    client.completions.create(model="a", prompt="x", max_tokens=2, extra_body={"beams": 2})
    chat = client.chat.completions.create(model="b", messages=[{"role": "user", "content": "hi"}], max_tokens=3)
    for _ in range(2):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="a", prompt="x", n=99)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("c")
    fresh.until(lambda: fresh.idle)
    found = read(fresh)
    beams = lm.generate("x", beams=2, max_new_tokens=2)
    assert found["polygpt_prompt_tokens_total", "a"] == 3 * count + 3 * short
    assert found["polygpt_generated_tokens_total", "a"] == 12 + 10 + 1 + len(beams.tokens)
    cached = found["polygpt_cached_tokens_total", "a"]
    # The second and third find all but the last token of the first still in the row.
    assert cached == 2 * (count - 1)
    assert found["polygpt_prompt_tokens_total", "b"] == chat.usage.prompt_tokens
    assert found["polygpt_generated_tokens_total", "b"] == chat.usage.completion_tokens
    assert found["polygpt_requests_total", "POST", "/v1/completions", "200"] == 6
    assert found["polygpt_requests_total", "POST", "/v1/completions", "400"] == 2
    assert found["polygpt_requests_total", "POST", "/v1/chat/completions", "200"] == 1
    assert found["polygpt_requests_total", "GET", "/v1/models", "404"] == 1
    assert found["polygpt_time_to_first_token_seconds_count", "a"] == 5
    assert found["polygpt_time_per_token_seconds_count", "a"] == 5
    assert 0 < found["polygpt_time_to_first_token_seconds_sum", "a"] < 120
    for name in ("polygpt_queue_length", "polygpt_slots_in_use", "polygpt_engine_restarts"):
        assert found[name, "a"] == found[name, "b"] == 0
    assert found["polygpt_slots", "a"] == 2
    assert found["polygpt_engine_up", "b"] == 1


def endless(lm):
    return {str(token): -100 for token in lm.stop_tokens}


def test_acceptance_of_speculation(lm):
    with serving.running({"a": lm}, draft="lookup", slots=2) as live:
        ids = [5, 6, 7, 8] * 8
        answer = live.client().completions.create(model="a", prompt=ids, max_tokens=30, temperature=0)
        assert answer.choices[0].text == lm.generate(ids, max_new_tokens=30, temperature=0.0).text
        found, engine = read(live), live.served.runner.statistics
        assert found["polygpt_drafted_tokens_total", "a"] == engine.drafted > 0
        assert found["polygpt_accepted_tokens_total", "a"] == engine.accepted <= engine.drafted


def test_what_waits_and_what_runs(fresh, lm):
    body = {"model": "a", "prompt": "x", "max_tokens": 900, "logit_bias": endless(lm)}
    with fresh.slowly(0.02):
        held = [fresh.connect("/v1/completions", body) for _ in range(4)]
        fresh.until(lambda: fresh.served.runner.load == (2, 2))
        found = read(fresh)
        assert (found["polygpt_slots_in_use", "a"], found["polygpt_queue_length", "a"]) == (2, 2)
        assert (found["polygpt_slots_in_use", "b"], found["polygpt_queue_length", "b"]) == (0, 0)
        for connection in held:
            connection.close()
    found = read(fresh)
    assert found["polygpt_requests_total", "POST", "/v1/completions", "499"] == 4


def test_paths_that_clients_make_up_make_no_counters(fresh):
    for path in ("/x", "/y/z", "/static/none", "/v1/models/q"):
        fresh.raw(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n".encode())
    fresh.raw(b"BREW / HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
    routes = {tuple(labels) for name, *labels in read(fresh) if name == "polygpt_requests_total"}
    assert routes == {
        ("GET", "other", "404"),
        ("GET", "/static", "404"),
        ("GET", "/v1/models", "404"),
        ("other", "/", "405"),
    }
