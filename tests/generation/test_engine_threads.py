"""The engine as a server uses it: threads, listeners, failures, statistics."""

import threading

import pytest
import zoo
from engines import CHUNK, GREEDY, engine_of, outcome, requests_of

from polygpt.errors import PolygptError, RequestError
from polygpt.generation import Engine, Request


def test_requests_come_from_several_threads():
    """Whoever waits steps; parts of each handle come in order and whole."""
    engine, requests = engine_of("softmax"), requests_of(24)
    expected = [outcome(engine.submit(request)) for request in requests]
    found, done = {}, threading.Event()

    def client(numbers):
        for number in numbers:
            handle = engine.submit(requests[number])
            tokens = [token for part in handle for token in part.tokens]
            assert tokens == handle.tokens
            found[number] = (tokens, handle.logprobs, handle.finish_reason)

    def step():
        while not done.is_set():
            engine.step()

    threads = [threading.Thread(target=client, args=(range(start, 24, 4),)) for start in range(4)]
    stepper = threading.Thread(target=step)
    for thread in [*threads, stepper]:
        thread.start()
    for thread in threads:
        thread.join(60)
    done.set()
    stepper.join(60)
    assert [found[number] for number in range(24)] == expected


def test_an_interrupted_step_fails_what_ran_and_the_next_request_succeeds(monkeypatch):
    engine = engine_of("softmax")
    expected = outcome(engine.submit(Request([1, 2], 5, GREEDY)))
    handle = engine.submit(Request([1, 2], 50, GREEDY))
    engine.step(1)
    with monkeypatch.context() as patch:
        patch.setattr(type(engine), "_distribute", lambda *a: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError):
            engine.step()
    with pytest.raises(MemoryError):
        handle.result()
    assert outcome(engine.submit(Request([1, 2], 5, GREEDY))) == expected


def test_a_listener_gets_the_parts_the_failures_and_the_end(monkeypatch):
    engine, heard = engine_of("softmax"), []

    def listen(handle, part):
        heard.append((handle, part))

    handle = engine.submit(Request([1, 2], 9, GREEDY), listener=listen)
    while engine.wait(0):
        engine.step()
    assert [token for _, part in heard for token in part.tokens] == handle.tokens
    assert [part.finish_reason for _, part in heard if part.finish_reason] == ["length"]
    assert {owner for owner, _ in heard} == {handle}
    heard.clear()
    waiting = engine.submit(Request([1, 2], 9, GREEDY), listener=listen)
    waiting.cancel()
    assert [(owner, part.finish_reason) for owner, part in heard] == [(waiting, "cancelled")]
    assert not engine.wait(0)
    heard.clear()
    failing = engine.submit(Request([1, 2], 9, GREEDY), listener=listen)
    with monkeypatch.context() as patch:
        patch.setattr(type(engine), "_distribute", lambda *a: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError):
            engine.step()
    assert heard == [(failing, None)]

    def broken(handle, part):
        raise OSError("gone")

    gone, beside = (engine.submit(Request([1, 2], 9, GREEDY), listener=each) for each in (broken, None))
    assert len(beside.result().tokens) == 9
    with pytest.raises(OSError, match="gone"):
        gone.result()


def test_what_came_before_a_handle_is_iterated_over_is_one_part():
    engine, came = engine_of("softmax"), []
    handle = engine.submit(Request([1, 2], 9, GREEDY, logprobs=1))
    while not handle.ended:
        came += engine.step(1)
    assert len(came) == 9
    (part,) = handle
    assert part == (handle.tokens, "", handle.logprobs, "length")
    assert list(handle) == []


def test_statistics_and_a_closed_engine():
    model = engine_of("softmax").model
    engine = Engine(model, zoo.lively(model), slots=8, chunk=CHUNK, queue=100)  # compiles nothing anew
    prompt = list(range(20))
    first = engine.submit(Request(prompt, 6, GREEDY)).result()
    engine.submit(Request([5, *prompt], 6, GREEDY)).result()
    second = engine.submit(Request([*prompt, 5], 6, GREEDY)).result()
    assert (first.cached_tokens, second.cached_tokens) == (0, 16)
    found = engine.statistics
    assert (found.requests, found.prompt_tokens, found.cached_tokens, found.tokens) == (3, 62, 16, 18)
    assert (found.slots, found.slots_in_use, found.queued, found.steps) == (8, 0, 0, 18)
    handles = [engine.submit(Request([1, 2], 60, GREEDY)) for _ in range(10)]
    engine.step(1)
    while engine.statistics.slots_in_use < 8:
        engine.step(1)
    assert engine.statistics.queued == 2
    handles[0].cancel()
    assert engine.statistics.slots_in_use == 7
    engine.step(1)  # the slot is free and taken again within one step
    assert (engine.statistics.slots_in_use, engine.statistics.queued) == (8, 1)
    engine.close(PolygptError("the end"))
    for handle in handles[1:]:
        with pytest.raises(PolygptError, match="the end"):
            handle.result()
    assert handles[0].finish_reason == "cancelled"
    assert not engine.wait(5)
    with pytest.raises(RequestError, match="closed"):
        engine.submit(Request([1], 1, GREEDY))
