"""More than the server can take, clients that go away, and an engine that fails."""

import itertools
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import openai
import pytest
import serving

from polygpt.language_model import LanguageModel


@pytest.fixture
def endless(lm):
    """A request whose answer does not end by itself."""
    bias = {str(token): -100 for token in lm.stop_tokens}
    return {"model": "tiny", "prompt": "the cat", "max_tokens": 900, "seed": 1, "logit_bias": bias}


def events(connection):
    """What a stream gives until it ends."""
    received = b""
    while piece := connection.recv(65536):
        received += piece
        if b"0\r\n\r\n" in piece:
            break
    return received


def test_past_the_queue_requests_are_refused_and_told_when_to_come_back(live, endless):
    with live.slowly(0.02):
        held = [live.connect("/v1/completions", endless | {"seed": seed}) for seed in range(12)]
        live.until(lambda: live.served.runner.in_flight == 12)
        live.until(lambda: live.served.runner.load == (4, 8))
        with pytest.raises(openai.RateLimitError) as caught:
            live.client().completions.create(model="tiny", prompt="x")
        assert caught.value.code == "queue_full"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        for connection in held:
            connection.close()
        live.until(lambda: live.idle)
    assert live.client().completions.create(model="tiny", prompt="x", max_tokens=1).choices


def test_a_request_of_many_sequences_is_taken_whole_or_not_at_all(live, endless):
    with live.slowly(0.02):
        held = live.connect("/v1/completions", endless | {"n": 6})
        live.until(lambda: live.served.runner.in_flight == 6)
        with pytest.raises(openai.RateLimitError):
            live.client().completions.create(model="tiny", prompt="x", n=7)
        assert live.served.runner.in_flight == 6
        held.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waiting", [False, True])
def test_a_client_that_goes_away_frees_its_slot_within_a_step(live, endless, stream, waiting):
    runner = live.served.runner
    with live.slowly(0.01):
        before = [live.connect("/v1/completions", endless) for _ in range(4 if waiting else 0)]
        live.until(lambda: runner.load[0] == len(before))
        connection = live.connect("/v1/completions", endless | {"stream": stream, "n": 2})
        live.until(lambda: sum(runner.load) == len(before) + 2)
        if stream:
            assert b"text/event-stream" in connection.recv(4096)
        steps = []
        engine = runner._engine
        slow = engine.step
        engine.step = lambda *given: (steps.append(runner.in_flight), slow(*given))[1]
        connection.close()
        live.until(lambda: runner.in_flight == len(before))
        seen = len(steps)
        live.until(lambda: sum(runner.load) == len(before))
        assert len(steps) - seen <= 2
        for other in before:
            other.close()


def test_keep_alive_comments_come_while_a_request_waits(live, endless):
    with live.slowly(0.05):
        held = [live.connect("/v1/completions", endless) for _ in range(4)]
        live.until(lambda: live.served.runner.load[0] == 4)
        waiting = live.connect("/v1/completions", endless | {"stream": True, "max_tokens": 2})
        received = b""
        while received.count(b": waiting\n\n") < 2:
            received += waiting.recv(4096)
        assert b"data:" not in received.partition(b"\r\n\r\n")[2]
        for connection in held:
            connection.close()
        received += events(waiting)
        assert received.rstrip().endswith(b"data: [DONE]\n\n\r\n0") or b"data: [DONE]" in received
        waiting.close()


def test_a_deadline_cuts_an_answer(lm, endless):
    with serving.running({"tiny": lm}, deadline_seconds=0.4, slots=2) as live, live.slowly(0.02):
        with pytest.raises(openai.APIStatusError) as caught:
            live.client().post("/completions", body=endless, cast_to=object)
        assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
        connection = live.connect("/v1/completions", endless | {"stream": True})
        received = events(connection)
        assert b"deadline_exceeded" in received
        assert b"[DONE]" not in received
        connection.close()
        with pytest.raises(openai.APIError, match="longer than 0"):
            for _ in live.client().completions.create(stream=True, **endless):
                pass
        live.until(lambda: live.idle)


def test_a_client_that_reads_nothing_is_cut_and_others_go_on(lm, endless):
    with serving.running({"tiny": lm}, idle_seconds=1.0, slots=2) as live:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        listener.connect(live.address)
        asked = endless | {"stream": True, "logprobs": 20, "max_tokens": 900, "echo": True, "return_token_ids": True}
        listener.sendall(serving.post("/v1/completions", asked | {"n": 2}))
        answer = live.client().completions.create(model="tiny", prompt="x", max_tokens=3)
        assert answer.choices
        live.until(lambda: not live.state.active, 30)
        live.until(lambda: live.idle)
        listener.close()


def test_many_at_once_get_what_each_would_get_alone(live, lm):
    prompts = ["the cat", "sat on", "the mat, é", "x " * 5]
    settings = [(prompts[seed % 4], seed) for seed in range(24)]
    expected = [lm.generate(prompt, seed=seed, max_new_tokens=12, temperature=1.0).text for prompt, seed in settings]

    def ask(setting):
        prompt, seed = setting
        client = live.client()
        if seed % 2:
            chunks = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, seed=seed, stream=True)
            return "".join(chunk.choices[0].text for chunk in chunks)
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=12, seed=seed).choices[0].text

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, settings)) == expected


def test_an_engine_that_fails_ends_its_requests_and_is_made_anew(lm, endless, caplog):
    with serving.running({"tiny": lm}, slots=2, queue=4) as live:
        runner, broken = live.served.runner, threading.Event()
        make, failures = runner._make_engine, []

        def make_engine():
            if not broken.is_set():
                failures.append(1)
                raise RuntimeError("/secret/path: no memory")
            return make()

        runner._make_engine = make_engine
        with live.slowly(0.02):
            whole = live.connect("/v1/completions", endless)
            stream = live.connect("/v1/completions", endless | {"stream": True})
            waiting = live.connect("/v1/completions", endless)
            live.until(lambda: runner.in_flight == 3)

            def fail(*_):
                raise RuntimeError("/secret/path: the device is gone")

            runner._engine.step = fail
            live.until(lambda: not runner.healthy)
            code, health = serving.body_of(live.raw(b"GET /health HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"))
            assert (code, health["status"]) == (503, "engine failed")
            told = [connection.recv(65536) for connection in (whole, waiting)] + [events(stream)]
            for raw in told:
                assert b"engine_failed" in raw
                assert b"secret" not in raw
            assert told[0].startswith(b"HTTP/1.1 503")
            assert b"data: [DONE]" not in told[2]
            with pytest.raises(openai.InternalServerError) as caught:
                live.client().completions.create(model="tiny", prompt="x")
            assert (caught.value.status_code, caught.value.code) == (503, "engine_failed")
            assert caught.value.response.headers["retry-after"]
            live.until(lambda: len(failures) >= 2)
            broken.set()
            live.until(lambda: runner.healthy)
            runner._engine.step = runner._engine.step
        assert runner.restarts == 1
        answer = live.client().completions.create(model="tiny", prompt="x", max_tokens=5, seed=2)
        assert answer.choices[0].text == lm.generate("x", max_new_tokens=5, seed=2, temperature=1.0).text
        assert "the device is gone" in caplog.text


def test_weights_that_are_damaged_fail_a_request_and_not_the_server(lm):
    params = jax.tree.map(lambda leaf: leaf * float("nan"), lm.params)
    damaged = LanguageModel(lm.config, params, lm.tokenizer, lm.origin)
    with serving.running({"tiny": damaged}, slots=2) as live:
        with pytest.raises(openai.InternalServerError, match="not finite") as caught:
            live.client().completions.create(model="tiny", prompt="x", max_tokens=2)
        assert caught.value.status_code == 500
        with pytest.raises(openai.APIError, match="not finite"):
            list(live.client().completions.create(model="tiny", prompt="x", max_tokens=2, stream=True))
        with pytest.raises(openai.InternalServerError, match="not a finite"):
            live.client().completions.create(model="tiny", prompt="xy", max_tokens=0, echo=True, logprobs=1)
        assert live.served.runner.healthy


def test_what_nobody_foresaw_is_a_500_that_tells_nothing(live, monkeypatch, caplog):
    def broken(*_):
        raise ZeroDivisionError("/secret/path")

    monkeypatch.setattr(live.served, "facts", broken)
    raw = live.raw(b"GET /v1/settings HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
    code, body = serving.body_of(raw)
    assert (code, body["error"]["code"]) == (500, "internal_error")
    assert b"secret" not in raw
    assert b"ZeroDivision" not in raw
    assert "ZeroDivisionError" in caplog.text


def test_two_models_are_served_side_by_side(lm):
    other = LanguageModel(lm.config, jax.tree.map(lambda leaf: 1.2 * leaf, lm.params), lm.tokenizer)
    with serving.running({"one": lm, "org/two": other}, slots=2) as live:
        client = live.client()
        assert [model.id for model in client.models.list()] == ["one", "org/two"]
        for name, model in (("one", lm), ("org/two", other)):
            answer = client.completions.create(model=name, prompt="the cat", max_tokens=6, seed=1)
            assert answer.choices[0].text == model.generate("the cat", max_new_tokens=6, seed=1, temperature=1.0).text
        facts = json.loads(client.get("/settings", cast_to=str))["models"]
        assert [(fact["name"], fact["context_length"], fact["chat"]) for fact in facts] == [
            ("one", 1024, True),
            ("org/two", 1024, False),
        ]
        assert time.time() - client.models.retrieve("org/two").created < 600


# Compiling it takes half a second, and its validation none.
LONG_TO_COMPILE = 'start: %json {"type": "integer", "multipleOf": 99991}'


def test_compiling_a_constraint_holds_up_no_stream(live, client, endless):
    pytest.importorskip("llguidance", reason="llguidance is not installed (pip install 'polygpt[constraints]')")
    asked = {"model": "tiny", "prompt": "x", "max_tokens": 1, "grammar": LONG_TO_COMPILE}
    live.served.lm.constraint(grammar="start: /a/")  # what is done once for all constraints
    began = time.perf_counter()
    live.served.lm.constraint(grammar=LONG_TO_COMPILE)
    alone = time.perf_counter() - began
    arrivals, answered = [], threading.Event()
    with live.slowly(0.005), live.connect("/v1/completions", endless | {"stream": True}) as stream:
        stream.recv(65536)
        other = threading.Thread(target=lambda: (client.post("/completions", body=asked, cast_to=dict), answered.set()))
        other.start()
        while not answered.is_set() and stream.recv(65536):
            arrivals.append(time.perf_counter())
        other.join()
    longest = max(after - before for before, after in itertools.pairwise(arrivals))
    assert len(arrivals) > 10
    assert longest < alone / 2


def test_a_constraint_that_takes_too_long_to_compile_is_refused_and_the_next_is_followed(lm):
    pytest.importorskip("llguidance", reason="llguidance is not installed (pip install 'polygpt[constraints]')")
    with serving.running({"tiny": lm}, constraint_seconds=0.05) as live, live.client() as client:
        with pytest.raises(openai.BadRequestError, match=r"grammar was not compiled within 0\.05 seconds") as caught:
            client.completions.create(model="tiny", prompt="x", extra_body={"grammar": LONG_TO_COMPILE})
        assert (caught.value.param, caught.value.code) == ("grammar", "constraint_too_slow")
        compiled = threading.Event()
        live.served.compiler._queue.put(compiled.set)  # runs after what compiles now
        assert compiled.wait(60)
        done = client.completions.create(model="tiny", prompt="x", extra_body={"regex": "ab"})
        assert done.choices[0].text == "ab"
