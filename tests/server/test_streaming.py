"""What a streamed token costs the server: wake-ups, timers and the bytes around it."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import h11
import pytest

from polygpt.generation import Logprob, Part
from polygpt.server.jobs import Job, Work
from polygpt.server.logprobs import completion_logprobs
from polygpt.server.protocol import _Connection


def test_a_step_wakes_the_event_loop_once_for_all_streams(live, lm, monkeypatch):
    runner, wakes, steps = live.served.runner, [], []
    tell, events = runner._on_loop, runner._events
    monkeypatch.setattr(runner, "_on_loop", lambda *given: (wakes.append(1), tell(*given))[1])
    monkeypatch.setattr(runner, "_events", lambda parts: (steps.append(len(parts)), events(parts))[1])
    body = {"model": "tiny", "prompt": "x", "max_tokens": 12, "stream": True}
    body["logit_bias"] = {str(token): -100 for token in lm.stop_tokens}
    with live.slowly(0.02):
        streams = [live.connect("/v1/completions", body | {"seed": seed}) for seed in range(4)]
        for stream in streams:
            received = b""
            while b"data: [DONE]" not in received:
                received += stream.recv(65536)
            stream.close()
    assert max(steps) == 4
    assert len(wakes) <= len(steps)


def test_a_token_is_sent_in_its_step(live, lm, monkeypatch):
    bias = {str(token): -100 for token in range(lm.tokenizer.vocab_size) if token != 40}  # one letter, again and again
    body = {"model": "tiny", "prompt": "x", "max_tokens": 10, "stream": True, "logit_bias": bias}
    engine, seen = live.served.runner._engine, threading.Semaphore(1)
    step = engine.step  # the next one waits until the client has the token of this one
    monkeypatch.setattr(engine, "step", lambda *_: (seen.acquire(timeout=20), step(1))[1])
    stream, received = live.connect("/v1/completions", body), b""
    for count in range(1, 11):
        while received.count(b"data: {") < count:
            received += stream.recv(65536)
        seen.release()
    while b"data: [DONE]" not in received:
        received += stream.recv(65536)
    stream.close()
    events = [json.loads(line[6:]) for line in received.splitlines() if line.startswith(b"data: {")]
    assert [event["choices"][0]["text"] for event in events] == [lm.tokenizer.decode([40])] * 10


def test_one_timer_serves_all_waits_of_a_stream():
    async def main():
        loop, job = asyncio.get_running_loop(), Job([Work(None)])
        later, timers = loop.call_later, []
        loop.call_later = lambda *given: (timers.append(given[0]), later(*given))[1]
        part = Part([1], "a", [], None)
        for _ in range(50):
            loop.call_soon(job.receive, 0, part)
            assert await job.next(0.2) == [(0, part)]
        assert timers == [0.2]
        began = loop.time()
        assert await job.next(0.2) == []
        assert loop.time() - began >= 0.19
        loop.call_soon(job.receive, 0, Part([], "", [], "stop"))
        assert (await job.next(0.2))[0][1].finish_reason == "stop"
        assert await job.next(0.2) == []
        assert job.ended
        assert job._timer.cancelled()

    with ThreadPoolExecutor(1) as pool:  # in this thread the browser's tests leave an event loop running
        pool.submit(asyncio.run, main()).result()


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("length", [None, b"7"])
def test_a_body_in_pieces_is_laid_out_as_h11_does(method, version, length):
    headers = [(b"content-type", b"text/plain")] + ([(b"content-length", length)] if length else [])
    pieces = [b"", b""] if method == b"HEAD" else [b"abc", b"", b"defg"]
    sent = []
    for kind in (h11.Connection, _Connection):
        connection = kind(h11.SERVER)
        connection.receive_data(method + b" / HTTP/" + version + b"\r\nhost: x\r\n\r\n")
        connection.next_event(), connection.next_event()
        events = [h11.Response(status_code=200, headers=headers), *map(h11.Data, pieces), h11.EndOfMessage()]
        sent.append([connection.send(event) for event in events])
        with pytest.raises(h11.LocalProtocolError):
            connection.send(h11.Data(b"more"))
    assert sent[0] == sent[1]


def test_no_nan_reaches_a_client(shared):
    with pytest.raises(ValueError, match="NaN"):
        completion_logprobs(shared.served, [40], [Logprob(float("nan"), ())], None)
