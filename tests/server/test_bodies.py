"""Whatever bytes a client sends: a value, or an error of its own making."""

import json
import math
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from polygpt.server.bodies import check_fields, parse_json
from polygpt.server.errors import ApiError
from polygpt.server.messages import read_messages
from polygpt.server.schemas import ChatCompletion, Completion

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
VALUES = JSON | st.lists(JSON, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "name"]), JSON)


def outcome(call, *arguments):
    """A value, or the client's own mistake; anything else is a fault of ours."""
    try:
        return call(*arguments), None
    except ApiError as error:
        return None, error


@given(JSON, st.booleans())
def test_json_is_read_as_it_was_written(value, ascii_only):
    try:
        data = json.dumps(value, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:  # half a surrogate in a key
        return
    halves = any(0xD800 <= ord(char) < 0xE000 for char in json.dumps(value, ensure_ascii=False))
    if halves:
        with pytest.raises(ApiError):
            parse_json(data, 64)
    else:
        assert parse_json(data, 64) == value


@given(st.binary(max_size=200) | st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"[" * 100_000)
@example(b'{"a":' * 50_000)
@example(b'"' + b"\\" * 100_001)
@example(b"1" * 100_000)
@example(b'{"a": 1, "a": 2}')
def test_any_bytes_are_a_value_or_a_400(data):
    value, error = outcome(parse_json, data, 64)
    if error is None:
        json.dumps(value, allow_nan=False).encode()
    else:
        assert (error.status, error.code, len(error.message) < 400) == (400, "invalid_json", True)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 30, str(2**63), "1e400"])
def test_numbers_that_are_none_are_refused(text):
    for body in (text, f'{{"temperature": {text}}}', f"[[{text}]]"):
        with pytest.raises(ApiError) as caught:
            parse_json(body.encode(), 64)
        assert caught.value.status == 400


def test_nesting_is_counted_outside_of_strings():
    assert parse_json(b'["[[[[[[\\"[[[", [[]]]', 3) == ['[[[[[["[[[', [[]]]
    assert parse_json(b"[[[[]]]]", 4) == [[[[]]]]
    with pytest.raises(ApiError, match="deeper than 4"):
        parse_json(b"[[[[[]]]]]", 4)


def test_half_a_surrogate_is_no_text():
    for text in (r'"\ud800"', r'{"\udfff": 1}', r'["a\udc00b"]'):
        with pytest.raises(ApiError, match="surrogate"):
            parse_json(text.encode(), 64)
    assert parse_json(rb'"\ud83d\ude00"', 64) == "\N{GRINNING FACE}"


@given(
    st.sampled_from([Completion, ChatCompletion]),
    st.dictionaries(st.sampled_from([*Completion.model_fields, *ChatCompletion.model_fields, "x"]), JSON, max_size=6),
)
def test_any_fields_are_a_body_or_a_400(cls, fields):
    body, error = outcome(check_fields, cls, {"model": "m", "prompt": "x", "messages": [], **fields})
    if error is None:
        assert math.isfinite(body.temperature)
    else:
        assert error.status == 400
        assert error.param is None or isinstance(error.param, str)


@given(st.lists(st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls"]), VALUES), max_size=3))
def test_any_messages_are_a_conversation_or_a_400(messages):
    read, error = outcome(read_messages, messages)
    if error is None:
        assert all(isinstance(message["content"], str) for message in read)
    else:
        assert error.status == 400
        assert error.param.startswith("messages")


def test_null_counts_as_absent_and_ignored_fields_may_hold_anything():
    body = check_fields(Completion, {"model": "m", "prompt": "x", "seed": None, "user": {"a": 1}})
    assert body.seed is None
    assert check_fields(ChatCompletion, {"model": "m", "messages": [], "metadata": {"a": "b"}, "store": True})
    with pytest.raises(ApiError, match="use 'tools' instead"):
        check_fields(ChatCompletion, {"model": "m", "messages": [], "functions": []})
    with pytest.raises(ApiError, match="JSON object, not an array"):
        check_fields(Completion, [])


def test_the_time_to_read_a_body_grows_with_its_length_alone():
    began = time.process_time()
    with pytest.raises(ApiError, match="not JSON"):
        parse_json(b'"' + b'\\"' * 1_000_000, 64)
    with pytest.raises(ApiError, match="and 29997 more"):
        check_fields(Completion, {"model": "m", "prompt": "x", **{f"k{i}": i for i in range(30_000)}})
    with pytest.raises(ApiError) as caught:
        check_fields(Completion, {"model": "m", "prompt": "x", "k" * 1_000_000: 1})
    assert len(caught.value.message) <= 1000
    assert time.process_time() - began < 10  # minutes and hours, where each quote or key begins a search


def test_null_counts_as_absent_within_objects_too():
    body = check_fields(
        Completion, {"model": "m", "prompt": "x", "stream": True, "stream_options": {"include_usage": None}}
    )
    assert not body.wants_usage
    tool = {"type": "function", "function": {"name": "f", "description": None, "strict": None, "parameters": None}}
    schema = {"type": "json_schema", "json_schema": {"name": "s", "strict": None, "schema": {"const": None}}}
    chat = check_fields(
        ChatCompletion, {"model": "m", "messages": [], "tools": [tool], "response_format": schema, "stop": None}
    )
    assert chat.tools[0].function.parameters == {}
    assert chat.response_format.json_schema.schema_ == {"const": None}


@pytest.mark.parametrize("arguments", [r'{"a": "\ud800"}', '{"a": NaN}', "[" * 900 + "]" * 900, '{"a": 1'])
def test_arguments_that_are_no_json_of_text_stay_text(arguments):
    call = {"id": None, "type": "function", "function": {"name": "f", "arguments": arguments}}
    read = read_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert read[0]["tool_calls"][0]["function"]["arguments"] == arguments
