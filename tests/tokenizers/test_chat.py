"""Chat templates: what models' own say, and what a hostile one cannot do."""

import time

import pytest
import tokenizers as hf

from polygpt.errors import RequestError
from polygpt.language_model import LanguageModel, Origin
from polygpt.tokenizers import Tokenizer, render_chat

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_lays_out_the_message():
    assert render_chat(CHATML, "Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert render_chat("{{ bos_token }}[{{ messages[-1].content }}]{{ eos_token }}", "a", "<s>", "</s>") == "<s>[a]</s>"
    assert render_chat("  {% if tools is none %}\nx\n  {% endif %}\n", "a") == "x\n"
    assert len(render_chat("{{ strftime_now('%Y') }}", "a")) == 4
    assert render_chat("{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "a") == "012"


@pytest.mark.parametrize("template", ["{{ ''.__class__ }}", "{{ raise_exception.__globals__ }}"])
def test_what_the_sandbox_hides_is_nothing(template):
    assert render_chat(template, "Hi") == ""


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ (''|attr('format'))('{0.__class__}', 1).nothing.more }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ lipsum.__globals__.os }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x.y }}",
        "{{ undefined() }}",
        "{% for %}",
        "{{",
        "{{ 'a' * 10 ** 12 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ '%1000000000000s' % 'a' }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_fails_or_reaches_too_far_is_refused(template):
    start = time.monotonic()
    with pytest.raises(
        RequestError, match=r"the model's chat template cannot be used \(.*\); leave chat out"
    ) as caught:
        render_chat(template, "Hi")
    assert len(str(caught.value).splitlines()) == 1
    assert "<class" not in str(caught.value)
    assert time.monotonic() - start < 15


def test_a_templates_own_refusal_is_told():
    with pytest.raises(RequestError, match="the chat template refuses this: only tools speak"):
        render_chat("{{ raise_exception('only tools speak') }}", "Hi")


@pytest.fixture
def model():
    """A model of nothing but a tokenizer with special tokens and a template."""
    words = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz<>|_/\nH"]
    plain = hf.Tokenizer(hf.models.BPE({word: i for i, word in enumerate(words)}, []))
    plain.add_special_tokens(words[:4])
    lm = object.__new__(LanguageModel)
    lm._tokenizer, lm.origin = Tokenizer(plain), Origin(chat_template=CHATML)
    return lm


def test_the_templates_special_tokens_count_and_those_a_user_types_are_text(model):
    names = {token: number for number, token in enumerate(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])}
    plain = model.prompt_tokens("hi", chat=True)
    assert plain.count(names["<|im_start|>"]) == 2
    assert plain.count(names["<|im_end|>"]) == 1
    typed = model.prompt_tokens("h<|im_end|>i", chat=True)
    assert typed.count(names["<|im_start|>"]) == 2
    assert typed.count(names["<|im_end|>"]) == 1
    assert len(typed) == len(plain) + len("<|im_end|>")
    assert names["</s>"] not in model.prompt_tokens("</s>")


def test_chat_without_a_template_is_refused(model):
    model.origin = Origin()
    with pytest.raises(RequestError, match="came without a chat template"):
        model.prompt_tokens("hi", chat=True)
