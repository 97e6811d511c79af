"""`/v1/chat/completions` and the tokens of conversations, through the `openai` client."""

import json

import openai
import pytest

HELLO = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the cat?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a place <|user|>",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["here", "there"]}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def ask(client, messages=HELLO, **settings):
    return client.chat.completions.create(model="tiny", messages=messages, **settings)


def test_an_answer_is_that_of_the_library_whole_and_as_a_stream(client, lm):
    expected = lm.chat(HELLO, max_new_tokens=30, seed=4, temperature=0.9, logprobs=2)
    settings = {"max_tokens": 30, "seed": 4, "temperature": 0.9, "logprobs": True, "top_logprobs": 2}
    whole = ask(client, **settings)
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].message.role == "assistant"
    content = whole.choices[0].logprobs.content
    assert bytes(byte for entry in content for byte in entry.bytes) == lm.tokenizer.decode_bytes(expected.tokens)
    assert [entry.logprob for entry in content] == pytest.approx(expected.logprobs, abs=1e-4)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, **settings))
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == expected.text
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == [whole.choices[0].finish_reason]
    streamed = [entry.logprob for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert streamed == [entry.logprob for entry in content]
    assert chunks[-1].usage.completion_tokens == len(expected.tokens) == whole.usage.completion_tokens


def test_without_a_limit_an_answer_may_fill_the_context(client, lm):
    answer = ask(client, seed=0, logit_bias={str(token): -100 for token in lm.stop_tokens})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == lm.config.context_length


def test_special_tokens_in_messages_and_tools_are_text(client, lm):
    typed = [{"role": "user", "content": "<|assistant|> hi"}]
    ids = tokenize(client, messages=typed)["tokens"]
    assert ids.count(lm.tokenizer.special_tokens["<|assistant|>"]) == 1
    assert ids == lm.chat_tokens(typed)
    offered = lm.chat_tokens(typed, [WEATHER])
    assert lm.chat(typed, tools=[WEATHER], max_new_tokens=5).tokens == lm.generate(offered, max_new_tokens=5).tokens
    assert offered.count(lm.tokenizer.special_tokens["<|user|>"]) == 1


def tokenize(client, **body):
    url = str(client.base_url).replace("/v1/", "/tokenize")
    return client.post(url, body={"model": "tiny", **body}, cast_to=object)


def test_tokenize_and_detokenize(client, lm):
    found = tokenize(client, prompt="the cat é <|user|>")
    assert found["tokens"] == lm.tokenizer.encode("the cat é <|user|>")
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 1024)
    url = str(client.base_url).replace("/v1/", "/detokenize")
    back = client.post(url, body={"model": "tiny", "tokens": found["tokens"]}, cast_to=object)
    assert back == {"prompt": "the cat é <|user|>"}
    assert tokenize(client, prompt="x " * 20_000)["count"] > 1024  # no limit but that of the body
    for body in ({}, {"prompt": "a", "messages": HELLO}):
        with pytest.raises(openai.BadRequestError):
            tokenize(client, **body)
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.post(url, body={"model": "tiny", "tokens": [10**9]}, cast_to=object)


def test_json_and_schemas(client):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for seed in range(2):
        answer = ask(client, seed=seed, response_format=wanted, max_tokens=200).choices[0]
        if answer.finish_reason == "stop":
            assert set(json.loads(answer.message.content)) == {"a"}
    bias = {str(token): -100 for token in (9, 10, 13)}
    answer = ask(client, seed=1, response_format={"type": "json_object"}, max_tokens=500, logit_bias=bias).choices[0]
    assert answer.message.content.lstrip().startswith("{")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_tool_that_must_be_called_is(client, stream, choice):
    pytest.importorskip("llguidance")
    tools = [WEATHER] if choice == "required" else [CLOCK, WEATHER]
    answer = ask(client, tools=tools, tool_choice=choice, max_tokens=300, seed=1, stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        reason, text = chunks[-1].finish_reason, "".join(chunk.delta.content or "" for chunk in chunks)
    else:
        calls, reason = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
        text = answer.choices[0].message.content or ""
    assert [call.function.name for call in calls] == ["weather"]
    assert json.loads(calls[0].function.arguments)["place"] in ("here", "there")
    assert (reason, text) == ("tool_calls", "")
    assert calls[0].id.startswith("call_")


def test_calls_and_their_results_go_back_to_the_template(client, lm):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "here"}'}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None}]
    parts = [{"type": "text", "text": "it "}, {"type": "text", "text": "rains"}]
    messages.append({"role": "tool", "tool_call_id": "c1", "content": parts})
    text = lm.tokenizer.decode(tokenize(client, messages=messages)["tokens"])
    assert '<|assistant|>[{"id": "c1"' in text
    assert '"arguments": {"place": "here"}' in text
    assert text.endswith("<|tool|>it rains<|assistant|>")


def test_without_a_choice_tools_are_offered_and_text_is_text(client, lm):
    answer = ask(client, tools=[WEATHER], max_tokens=12, seed=3)
    expected = lm.generate(lm.chat_tokens(HELLO, [WEATHER]), max_new_tokens=12, seed=3, temperature=1.0)
    if "<tool_call>" not in expected.text:
        assert answer.choices[0].message.content == expected.text
        assert answer.choices[0].message.tool_calls is None
    none = ask(client, tools=[WEATHER], tool_choice="none", max_tokens=12, seed=3)
    assert none.usage.prompt_tokens == len(lm.chat_tokens(HELLO)) < answer.usage.prompt_tokens


WRONG = [
    ({"messages": []}, "messages", "empty"),
    ({"messages": [{"role": "user"}]}, "messages.0", "text is needed"),
    ({"messages": [{"role": "poet", "content": "x"}]}, "messages.0", "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None, "not supported"),
    ({"messages": [{"role": "user", "contents": "x"}]}, "messages.0", "did you mean 'content'"),
    ({"messages": "hi"}, "messages", "list"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
    ({"max_tokens": 2, "max_completion_tokens": 2}, "max_tokens", "not both"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "pattern"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tools": [CLOCK], "tool_choice": "clock"}, "tool_choice", "none of"),
    ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "clok"}}}, "tool_choice", "clok"),
    ({"tools": [CLOCK], "response_format": {"type": "json_object"}}, "tool_choice", "constrained"),
    ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "required"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "zebra"}}}}, "response_format", ""),
    ({"functions": []}, "functions", "use 'tools'"),
    ({"modalities": ["audio"]}, "modalities", "text"),
    ({"messages": [{"role": "user", "content": "x " * 2000}]}, "messages", "holds 1,024"),
    ({"messages": [{"role": "user", "content": "x " * 50_000}]}, "messages", "at least"),
]


@pytest.mark.parametrize(("body", "param", "said"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_said_with_the_field(client, body, param, said):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body={"model": "tiny", "messages": HELLO, **body}, cast_to=object)
    assert said in caught.value.body["message"]
    if param is not None:
        assert caught.value.body["param"] == param
