"""`polygpt chat`: what is typed, what is answered, and how one leaves."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from foreign import with_tokenizer

from polygpt import load
from polygpt.cli import chat
from polygpt.errors import RequestError
from polygpt.generation import Engine

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def model(workdir):
    folder = with_tokenizer(workdir / "talker")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 30_000}))
    return folder


@pytest.fixture
def talk(model, program, monkeypatch):
    def call(*lines, options=()):
        typed = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        return program("chat", model, "--max-new-tokens", 6, *options)

    return call


def test_answers_are_those_of_the_conversation_so_far(talk, model):
    done = talk("hello", "and now?", "/save talk.json", options=["--system", "be kind"])
    assert (done.code, done.err) == (0, "[5 messages written to talk.json]\n")
    messages = json.loads(Path("talk.json").read_text())
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    lm = load(model, weights="auto")
    for end in (2, 4):
        answer = lm.chat(messages[:end], max_new_tokens=6, temperature=0.8, top_p=0.95)
        assert answer.text == messages[end]["content"]
    assert done.out == f"{messages[2]['content']}\n{messages[4]['content']}\n"


def test_reset_forgets_and_a_seed_changes_the_answer(talk):
    answers = ["hello", "/save 1", "/reset", "hello", "/save 2", "/reset", "/seed 5", "hello", "/save 3"]
    done = talk(*answers)
    assert done.code == 0
    assert done.err.splitlines()[:2] == ["[2 messages written to 1]", "[the conversation is forgotten]"]
    assert "[the answers that follow use seed 5]" in done.err
    first, again, other = (json.loads(Path(name).read_text()) for name in "123")
    assert len(first) == 2
    assert first == again != other


def test_quit_leaves_and_help_lists_the_commands(talk):
    assert talk("/quit", "hello").out == ""
    shown = talk("/help").out
    assert all(f"/{name}" in shown for name in ("reset", "save", "seed", "help", "quit"))


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("/sed 5", "did you mean '/seed'? (/help lists commands; //... sends /... as a message)"),
        ("/help me", "/help takes no argument"),
        ("/seed", "/seed takes a whole number in 0..4294967295, as in /seed 1"),
        ("/seed " + "9" * 5000, "in 0..4294967295, not 9999"),
        ("/seed -1", "in 0..4294967295, not -1"),
        ("/seed 4294967296", "in 0..4294967295, not 4294967296"),
        ("/seed ²", "in 0..4294967295, not ²"),
        ("/save", "/save takes the name of a file"),
        ("/save /nowhere/at/all", "cannot be written"),
        ("bad ¶", "'¶' (U+00B6)"),
        (b"h\xe9llo", "this message: not UTF-8 text (byte 1)"),
    ],
)
def test_after_a_line_that_is_refused_the_next_is_answered(talk, line, word):
    done = talk(line, "hello", options=["--temperature", 0])
    assert done.code == 0
    assert done.err.startswith("polygpt: ")
    assert len(done.complaint) <= 2
    assert word in done.err
    assert done.out == talk("hello", options=["--temperature", 0]).out != ""


def test_a_message_may_begin_with_a_slash(talk):
    """The tokenizer of this model has no / to write it with."""
    done = talk("//help me", "/help")
    assert "'/' (U+002F) at index" in done.err
    assert "//TEXT" in done.out


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--max-new-tokens", "0"], "'--max-new-tokens': 0 is not at least 1"),
        (["--top-p", "7"], "top_p: must be less than or equal to 1"),
        (["--temperature", "-1"], "temperature"),
        (["--seed", "-1"], "'--seed': -1 is not in 0..4294967295"),
        (["--system", "a\udcff"], "--system: not UTF-8 text (character 1)"),
    ],
)
def test_settings_are_checked_before_the_model_is_loaded(talk, monkeypatch, options, word):
    monkeypatch.setattr(chat, "reading", None)
    done = talk("hello", options=options)
    assert (done.code, done.out, len(done.complaint)) == (2, "", 1)
    assert word in done.err


def test_an_answer_that_is_interrupted_before_its_first_token_leaves_nothing(model, monkeypatch, capsys):
    conversation = chat.Conversation(load(model), None, 0, {"max_new_tokens": 6})
    conversation.take("hello")
    before = list(conversation.messages)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupt)
        conversation.take("and now?")
    assert conversation.messages == before
    assert "[interrupted] [the message is dropped]" in capsys.readouterr().err
    conversation.take("and now?")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2


def test_a_conversation_longer_than_the_context_names_reset(model, talk):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 60}))
    done = talk("hello", "o" * 30, "hello", "hello " * 60, "/reset", "hello", options=["--temperature", 0])
    assert done.code == 0
    told = [line for line in done.err.splitlines() if line.startswith("polygpt: ")]
    assert len(told) >= 2
    assert all("and the model's context has 60: /reset starts anew" in line for line in told)
    first, *_, last = done.out.splitlines()
    assert first == last


def test_a_model_without_a_template_is_refused(run, program):
    done = program("chat", run)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "polygpt generate" in done.err


@pytest.mark.parametrize("messages", [[], "hello", [{"role": "user"}], [{"role": "user", "content": 3}], ["hello"]])
def test_what_is_no_conversation_is_refused(model, messages):
    if messages == "hello":
        assert load(model).chat_tokens(messages) == load(model).chat_tokens([{"role": "user", "content": "hello"}])
        return
    with pytest.raises(RequestError, match="role"):
        load(model).chat(messages)


def test_ctrl_c_ends_an_answer_and_ctrl_d_leaves(model):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "polygpt", "chat", model, "--max-new-tokens", "25000", "--temperature", "0"]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = ""

    def wait_for(text: str) -> None:
        nonlocal seen
        start = time.monotonic()
        while text not in seen:
            assert select.select([ours], [], [], 60 - (time.monotonic() - start))[0], seen[-500:]
            seen += os.read(ours, 4096).decode(errors="replace")
        seen = seen.partition(text)[2]

    try:
        wait_for("> ")
        os.write(ours, b"hello\n")
        wait_for("hello\r\n")
        seen += os.read(ours, 1).decode()  # the answer has begun
        child.send_signal(signal.SIGINT)
        wait_for("[interrupted]")
        wait_for("> ")
        os.write(ours, b"/quit now\n")
        wait_for("/quit takes no argument")
        wait_for("> ")
        if find_spec("readline") is not None:
            os.write(ours, b"\x1b[A\n")  # the key for the line before
            wait_for("/quit takes no argument")
            wait_for("> ")
        os.write(ours, b"\x04")
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
        os.close(ours)


def test_json_is_refused_by_name(talk, program):
    done = talk("hello", options=["--json"])
    assert (done.code, done.out, len(done.complaint)) == (2, "", 1)
    assert "chat has no --json: /save FILE" in done.err
    assert "Every command but chat takes --json" in program("--help").out
