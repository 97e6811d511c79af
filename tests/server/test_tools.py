"""Calls of tools: read from a text however it comes in pieces, and forced by a grammar."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygpt.server.tools import CallReader, ToolFormat, format_of, read_calls

TAGS = ToolFormat("<tool_call>", "</tool_call>", "arguments")
LIST = ToolFormat("[TOOL_CALLS]", "", "arguments")
PLAIN = ToolFormat("", "", "parameters")
CALL = '{"name": "f", "arguments": {"a": [1, "é"]}}'
TEXTS = [
    (TAGS, "hello", "hello", []),
    (TAGS, f"well <tool_call>\n{CALL}\n</tool_call>", "well ", ["f"]),
    (TAGS, f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call> done", " done", ["f", "f"]),
    (TAGS, f"<tool_call>{CALL}", "", ["f"]),
    (TAGS, "<tool_call>{nothing}</tool_call>x", "<tool_call>{nothing}</tool_call>x", []),
    (TAGS, "a < b <tool", "a < b <tool", []),
    (LIST, f"[TOOL_CALLS] [{CALL}, {CALL}]", "", ["f", "f"]),
    (LIST, "[TOOL", "[TOOL", []),
    (LIST, "[TOOL_CALLS] soon", "[TOOL_CALLS] soon", []),
    (PLAIN, '{"name": "g", "parameters": {}}', "", ["g"]),
    (PLAIN, '  {"name": 3}', '  {"name": 3}', []),
    (PLAIN, "a {", "a {", []),
    (PLAIN, "  ", "  ", []),
]


def read(style, pieces):
    reader, text, calls = CallReader(style), "", []
    for place, piece in enumerate(pieces):
        found = reader.feed(piece, last=place == len(pieces) - 1)
        text, calls = text + found.text, calls + found.calls
    return text, calls


@given(st.sampled_from(TEXTS), st.data())
def test_calls_are_the_same_however_the_text_is_divided(case, data):
    style, whole, text, names = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    found, calls = read(style, pieces)
    assert (found, [call.name for call in calls]) == (text, names)
    assert all(json.loads(call.arguments) in ({"a": [1, "é"]}, {}) for call in calls)


@given(st.sampled_from([TAGS, LIST, PLAIN]), st.lists(st.text('<tool_cal>/{}[]TOLCALS"n ae', max_size=9), min_size=1))
def test_text_without_calls_is_given_whole(style, pieces):
    text, calls = read(style, pieces)
    if not calls:
        assert text.replace("\n", "") == "".join(pieces).replace("\n", "")


def test_text_is_held_back_only_while_it_may_be_a_call():
    reader = CallReader(TAGS)
    assert reader.feed("one <b> two <tool").text == "one <b> two "
    assert reader.feed("box>").text == "<toolbox>"
    assert CallReader(PLAIN).feed("at once").text == "at once"


def test_formats_are_those_that_templates_show():
    assert format_of("... <tool_call> ...") == TAGS
    assert format_of("{{ '[TOOL_CALLS] [' }}") == LIST
    assert format_of("""{{ '"parameters": ' }}""") == PLAIN


@given(st.text(max_size=40) | st.recursive(st.integers() | st.text(max_size=3), st.lists).map(json.dumps))
def test_what_is_no_call_is_none(text):
    assert read_calls(text, TAGS) is None or '"name"' in text


@pytest.mark.parametrize("text", ["[]", "{}", "[1]", '[{"name": "f"}, 1]', "[" * 10_000])
def test_lists_count_only_whole(text):
    assert read_calls(text, TAGS) is None


@pytest.mark.parametrize("value", [r'"\ud800"', "NaN", "1e999"])
def test_a_call_that_no_answer_can_hold_is_text(value):
    text = f'<tool_call>{{"name": "f", "arguments": {{"a": {value}}}}}</tool_call>'
    assert read(TAGS, [text]) == (text, [])
