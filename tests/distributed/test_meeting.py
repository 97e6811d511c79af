"""How processes meet before JAX joins them: what is wrong with a start is said by all that have come."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from polygpt.distributed import meeting
from polygpt.distributed.meeting import join, wait_for_others
from polygpt.errors import PolygptError, RequestError


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def said(address, starts, limit=20.0):
    """What processes that start with these numbers and counts end with: None, or an error."""
    found = [None] * len(starts)

    def one(place, index, count):
        try:
            if index == 0:
                wait_for_others(address, count, limit, "SECONDS")
            else:
                join(address, index, count, limit, "SECONDS")
        except PolygptError as error:
            found[place] = error

    threads = [threading.Thread(target=one, args=(place, *start)) for place, start in enumerate(starts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_that_come_go_on_and_the_port_is_free_again(address):
    assert said(address, [(2, 3), (0, 3), (1, 3)]) == [None] * 3
    socket.create_server(("", int(address.rpartition(":")[2]))).close()


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (
            [(0, 3), (1, 3), (1, 3)],
            r"two processes were started with --process-id 1 \(on .*\); each needs its own, 0 to 2",
        ),
        ([(0, 2), (1, 3)], r"process 1 \(.*\) was started with --num-processes 3, process 0 \(.*\) with 2"),
    ],
)
def test_numbers_that_clash_are_named_by_every_process(address, starts, message):
    for error in said(address, starts):
        assert isinstance(error, RequestError)
        with pytest.raises(RequestError, match=message):
            raise error


def test_those_that_are_missing_are_named_by_every_process(address):
    for error in said(address, [(0, 4), (2, 4)], limit=1.0):
        assert not isinstance(error, RequestError)
        with pytest.raises(PolygptError, match=rf"{address} within 1 s \(SECONDS\): processes 1, 3 did not"):
            raise error


def test_what_is_no_process_does_not_count(address):
    host, _, port = address.rpartition(":")
    found = []
    own = threading.Thread(target=lambda: found.extend(said(address, [(0, 2), (1, 2)])))
    own.start()
    for text in (b"GET / HTTP/1.1\r\n\r\n", b'{"greeting": "hello"}\n', b""):
        try:
            with socket.create_connection((host, int(port)), timeout=1) as other:
                other.sendall(text)
        except OSError:
            time.sleep(0.05)
    own.join()
    assert found == [None, None]


@pytest.mark.parametrize("order", [[1, 2], [2, 1]])
def test_a_process_that_is_started_again_is_not_a_second_one(address, order):
    host, _, port = address.rpartition(":")
    found = []
    own = threading.Thread(target=lambda: found.extend(said(address, [(0, 3)])))
    own.start()
    for _ in range(200):
        try:
            with socket.create_connection((host, int(port)), timeout=1) as first:
                meeting._write(first, {"greeting": meeting.GREETING, "index": 1, "count": 3, "host": "here"})
            break
        except OSError:
            time.sleep(0.05)
    earlier = threading.Thread(target=lambda: found.extend(said(address, [(order[0], 3)])))
    earlier.start()
    earlier.join(0.3)
    assert said(address, [(order[1], 3)]) == [None]
    earlier.join()
    own.join()
    assert found == [None, None]


class Foreign(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_something_else_at_the_address_is_no_process_0(monkeypatch):
    monkeypatch.setattr(meeting, "_FOREIGN", 0.5)
    with HTTPServer(("127.0.0.1", 0), Foreign) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        with pytest.raises(PolygptError, match=f"{address}: something else answers there"):
            join(address, 1, 2, 30.0, "SECONDS")
        with pytest.raises(RequestError, match=r"cannot listen on port .*choose another"):
            wait_for_others(address, 2, 30.0, "SECONDS")
        server.shutdown()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(PolygptError, match=r"does not answer \(it is silent; 0.2 s, SECONDS\)"):
            join(address, 1, 2, 0.2, "SECONDS")
