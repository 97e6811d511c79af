"""Who may call, from where, and with how much: keys, host names, origins, limits of bodies and of time."""

import base64
import io
import json
import logging
import socket
import time

import openai
import pytest
import serving

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.server import ServerSettings
from polygpt.server.logs import JsonLines

KEYS = ("0123456789abcdef", "another key of the same server")
BODY = {"model": "tiny", "prompt": "x", "max_tokens": 1}
ROUTES = ["/", "/static/index.html", "/v1/models", "/v1/settings", "/version", "/metrics", "/nothing"]


@pytest.fixture(scope="module")
def locked(lm):
    with serving.running({"tiny": lm}, KEYS, origins=["https://page.example"], slots=2, queue=2) as live:
        yield live


def get(live, path, *headers):
    lines = [f"GET {path} HTTP/1.1", "connection: close", *(headers or ["host: 127.0.0.1"])]
    if not any(line.lower().startswith("host:") for line in lines):
        lines.append("host: 127.0.0.1")
    return live.raw("\r\n".join([*lines, "", ""]).encode())


def status(raw):
    return int(raw.split()[1])


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_asks_for_the_key(locked, path):
    refused = get(locked, path)
    assert status(refused) == 401
    assert serving.body_of(refused)[1]["error"]["code"] == "invalid_api_key"
    asked = b"www-authenticate: basic" if path in ("/", "/static/index.html") else b"www-authenticate: bearer"
    assert asked in refused.lower()
    for wrong in ("Bearer wrong", "Bearer", f"Bearer {KEYS[0]}x", f"Token {KEYS[0]}", "Basic !!!", "Basic AAAA"):
        assert status(get(locked, path, f"authorization: {wrong}")) == 401
    basic = base64.b64encode(f"me:{KEYS[0]}".encode()).decode()
    for right in (*(f"Bearer {key}" for key in KEYS), f"Basic {basic}", f"bearer {KEYS[0]}"):
        assert status(get(locked, path, f"authorization: {right}")) == (404 if path == "/nothing" else 200)


def test_health_asks_for_no_key(locked):
    assert serving.body_of(get(locked, "/health")) == (200, {"status": "ok"})


def test_the_client_brings_its_key(locked):
    assert locked.client().completions.create(**BODY).choices
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong" * 4, max_retries=0).completions.create(**BODY)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_other_machines_are_not_served_without_a_key(host):
    settings = ServerSettings(host=host)
    with pytest.raises(RequestError, match="--api-key-file"):
        settings.check(())
    settings.check(KEYS)
    for local in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        ServerSettings(host=local).check(())


def test_a_name_that_points_here_is_not_answered_without_a_key(live):
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
        raw = get(live, "/v1/models", f"host: {host}")
        assert serving.body_of(raw)[1]["error"]["code"] == "host_not_allowed"
    for host in ("localhost:80", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
        assert status(get(live, "/v1/models", f"host: {host}")) == 200


def test_other_origins_are_served_only_if_named(live, locked):
    key = f"authorization: Bearer {KEYS[0]}"
    named = get(locked, "/v1/models", key, "origin: https://page.example").lower()
    assert b"access-control-allow-origin: https://page.example" in named
    assert b"access-control" not in get(locked, "/v1/models", key, "origin: https://other.example").lower()
    assert b"access-control" not in get(live, "/v1/models", "host: 127.0.0.1", "origin: https://page.example").lower()
    asking = "access-control-request-method: POST\r\naccess-control-request-headers: authorization,content-type"
    preflight = f"OPTIONS /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\norigin: https://page.example\r\n{asking}\r\n"
    assert status(locked.raw(f"{preflight}connection: close\r\n\r\n".encode())) == 200


def test_a_form_of_another_page_is_not_json(live):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        raw = live.raw(serving.post("/v1/completions", BODY, kind=kind).replace(b"host", b"connection: close\r\nhost"))
        assert status(raw) == 415
        assert "application/json" in serving.body_of(raw)[1]["error"]["message"]


def test_the_page_is_under_a_strict_policy(live):
    for path in ("/", "/static/index.html", "/v1/models", "/nothing"):
        head = get(live, path).partition(b"\r\n\r\n")[0].decode().lower()
        assert "content-security-policy: default-src 'none'; script-src 'self'" in head
        assert "unsafe" not in head
        assert "x-content-type-options: nosniff" in head
        assert "server:" not in head


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static//etc/passwd"]
)
def test_only_the_pages_own_files_are_given(live, path):
    raw = get(live, path)
    assert status(raw) == 404
    assert b"def create_app" not in raw


def test_a_body_that_is_too_large_is_refused_however_it_comes(live):
    limit = live.settings.body_limit
    whole = serving.post("/v1/completions", b" " * (limit + 1))
    chunks = b"%x\r\n%s\r\n" % (limit // 2, b" " * (limit // 2)) * 3 + b"0\r\n\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    for raw in (whole, head + b"transfer-encoding: chunked\r\n\r\n" + chunks):
        code, body = serving.body_of(live.raw(raw))
        assert (code, body["error"]["code"]) == (413, "body_too_large")
        assert f"{limit:,}" in body["error"]["message"]
    with pytest.raises(openai.APIStatusError) as caught:
        live.client().completions.create(model="tiny", prompt="x" * (2 * limit))
    assert caught.value.status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for(live):
    began = time.monotonic()
    code, body = serving.body_of(live.raw(serving.post("/v1/completions", BODY)[:-3]))
    assert code == 408
    assert "within 1 seconds" in body["error"]["message"]
    assert 0.9 < time.monotonic() - began < 10


def test_headers_that_do_not_end_are_not_waited_for(lm):
    with serving.running({"tiny": lm}, header_seconds=0.3, idle_seconds=1.0, slots=1) as live:
        for begun in (b"", b"GET /hea", b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nx: "):
            began = time.monotonic()
            assert live.raw(begun) == b""
            assert 0.2 < time.monotonic() - began < 5
        # A second request on the same connection gets no more time.
        whole = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
        with socket.create_connection(live.address, timeout=10) as connection:
            connection.sendall(whole)
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            connection.sendall(whole[:20])
            began = time.monotonic()
            assert connection.recv(4096) in (b"",) or True
            assert time.monotonic() - began < 5
        began = time.monotonic()
        assert live.raw(whole).startswith(b"HTTP/1.1 200")  # closed when idle
        assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    "junk",
    [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"G" * 200_000, b"GET / HTTP/1.1\r\n\r\n"],
)
def test_what_is_no_http_is_a_400(live, junk):
    code, body = serving.body_of(live.raw(junk))
    assert (code, body["error"]["type"]) == (400, "invalid_request_error")


def test_too_many_connections_are_turned_away(lm):
    with serving.running({"tiny": lm}, max_connections=3, slots=1) as live:
        held = [socket.create_connection(live.address, timeout=10) for _ in range(3)]
        live.until(lambda: len(live.server.server_state.connections) == 3)
        assert serving.body_of(live.raw(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"))[0] == 503
        for connection in held:
            connection.close()
        live.until(lambda: not live.server.server_state.connections)
        assert status(get(live, "/health")) == 200


def test_the_log_is_lines_of_json_without_keys_and_control_characters(locked, lm):
    stream = io.StringIO()
    handler, logger = logging.StreamHandler(stream), logging.getLogger("polygpt.server")
    handler.setFormatter(JsonLines())
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        locked.client().completions.create(**BODY)
        get(locked, "/%0a%7b%22x%22%3a1%7d%1b%5b31m%E2%80%AE?key=" + KEYS[0], f"authorization: Bearer {KEYS[0]}")
        get(locked, "/v1/models", f"authorization: Bearer {KEYS[1][:-1]}")
        locked.until(lambda: locked.idle)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    text = stream.getvalue()
    assert not any(key in text or key[:10] in text for key in KEYS)
    assert all(char == "\n" or " " <= char < "\x7f" for char in text)
    lines = [json.loads(line) for line in text.splitlines()]
    assert [(line["method"], line["status"]) for line in lines] == [("POST", 200), ("GET", 404), ("GET", 401)]
    assert lines[0]["path"] == "/v1/completions"
    assert (lines[0]["model"], lines[0]["prompt_tokens"]) == ("tiny", len(lm.prompt_tokens("x")))
    assert lines[1]["path"].startswith('/\n{"x":1}')
    assert {"time", "client", "bytes", "seconds"} <= lines[0].keys()


def test_settings_refuse_what_cannot_be():
    for wrong in ({"port": 70000}, {"slots": 0}, {"deadline_seconds": 0}, {"hosts": "x"}):
        with pytest.raises(RequestError):
            validate(ServerSettings, wrong)
