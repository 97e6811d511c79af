"""`polygpt chat`: what is typed, what is answered, and how one leaves."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from foreign import with_tokenizer

from polygpt import load
from polygpt.errors import RequestError

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
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return program("chat", model, "--max-new-tokens", 6, *options)

    return call


def test_answers_are_those_of_the_conversation_so_far(talk, model):
    done = talk("hello", "and now?", "/save talk.json", options=["--system", "be kind"])
    assert (done.code, done.err) == (0, "")
    messages = json.loads(Path("talk.json").read_text())
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    lm = load(model, weights="auto")
    for end in (2, 4):
        answer = lm.chat(messages[:end], max_new_tokens=6, temperature=0.8, top_p=0.95)
        assert answer.text == messages[end]["content"]
    assert done.out == f"{messages[2]['content']}\n{messages[4]['content']}\n"


def test_reset_forgets_and_a_seed_changes_the_answer(talk):
    answers = ["hello", "/save 1", "/reset", "hello", "/save 2", "/reset", "/seed 5", "hello", "/save 3"]
    assert talk(*answers).code == 0
    first, again, other = (json.loads(Path(name).read_text()) for name in "123")
    assert len(first) == 2
    assert first == again != other


def test_quit_leaves_and_help_lists_the_commands(talk):
    assert talk("/quit", "hello").out == ""
    shown = talk("/help").out
    assert all(f"/{name}" in shown for name in ("reset", "save", "seed", "help", "quit"))


@pytest.mark.parametrize("line", ["/sed 5", "/seed", "/seed -1", "/save", "bad ¶", "/save /nowhere/at/all"])
def test_after_a_line_that_is_refused_the_next_is_answered(talk, line):
    done = talk(line, "hello", options=["--temperature", 0])
    assert done.code == 0
    assert done.err.startswith("polygpt: ")
    assert done.out == talk("hello", options=["--temperature", 0]).out != ""


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
            assert time.monotonic() - start < 60, seen[-500:]
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
        wait_for("no command")
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
