"""Chat templates: what models' own say, and what a hostile one cannot do."""

import time

import pytest
import tokenizers as hf

from polygpt.errors import RequestError
from polygpt.language_model import LanguageModel
from polygpt.origin import Origin
from polygpt.tokenizers import Tokenizer, chat_tokens, render_chat
from polygpt.tokenizers.typed import mark_tokens, unmark

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_lays_out_the_message():
    assert render_chat(CHATML, "Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    assert render_chat("{{ bos_token }}[{{ messages[-1].content }}]{{ eos_token }}", "a", ends) == "<s>[a]</s>"
    assert render_chat("  {% if tools is none %}\nx\n  {% endif %}\n", "a") == "x\n"
    assert len(render_chat("{{ strftime_now('%Y') }}", "a")) == 4
    assert render_chat("{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "a") == "012"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% generation %}\n a{% endgeneration %}b", " ab"),
        ("{%- for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration %}{% endfor %}", "<é>'x'"),
        ("{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}", "21"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<é>\'x\'"}'),
        ("{{ {'b': 1, 'a': none} | tojson }}", '{"b": 1, "a": null}'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":2,"b":1}'),
        ("{{ messages[0].content | tojson(ensure_ascii=true) }}", "\"<\\u00e9>'x'\""),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ documents is none }}{{ tools is none }}{{ documents is defined }}", "TrueTrueTrue"),
        ("{{ pad_token is defined }}{{ eos_token is defined }}{{ custom is defined }}", "FalseFalseFalse"),
        ("[{{ pad_token }}]", "[]"),
    ],
)
def test_templates_mean_what_they_mean_in_transformers(template, text):
    # Each text is what transformers 5.23 gives.
    assert render_chat(template, "<é>'x'") == text


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
        "{{ [1] | tojson(indent=10 ** 9) }}",
        "{{ nothing | tojson }}",
        "{% generation %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_fails_or_reaches_too_far_is_refused(template):
    start = time.monotonic()
    with pytest.raises(
        RequestError, match=r"the model's chat template cannot be used \(.*\); generate without --chat"
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


TOKENS = ("<s>", "<|im_end|>", "</s>", "ab", "<<s>>", "|")


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{{ c }}", "a <|im_end|> b"),
        ("{{ c | trim }}{{ c.strip() | length }}", "  <s> </s>\n"),
        ("{{ c | upper }}{{ c | lower }}{{ c.title() }}", "x <|im_end|> y"),
        ("{{ c | length }}{{ c[2:9] }}{{ c[0] }}", "a <|im_end|> b"),
        ("{{ '<|im_end|>' in c }}{{ '<|' in c }}{{ 'end|' in c }}{{ 'zz' in c }}", "a <|im_end|> b"),
        ("{{ c.startswith('<s>') }}{{ c.endswith('end|>') }}{{ c.find('|') }}{{ c.count('|') }}", "<s> <|im_end|>"),
        ("{{ c == '<s>' }}{{ c != '<s>' }}{{ '<s>' == c }}{{ {'<s>': 1}[c] }}", "<s>"),
        ("{{ c.split('</s>')[-1] }}{{ c.split('<s>') | length }}", "1<s>2</s>3<s>4"),
        ("{{ c | replace('<s>', '') }}{{ c.replace('</s>', '<s>') }}", "1<s>2</s>3"),
        ("{{ c.removeprefix('<s>').removesuffix('</s>') }}", "<s>x</s>"),
        ("{% for part in c.partition('<s>') %}[{{ part.strip() }}]{% endfor %}", " 1 <s> </s>"),
        ("{{ 'x' + c ~ c + 'y' }}{{ [c, c] | join('<s>') }}", "<s>"),
        ("{{ c.strip().startswith('</s>') }}", " </s>"),
        ("{{ messages | tojson }}", "<s>"),
        ("{{ '%s!' | format(c) }}{{ '{}'.format(c) }}", "<s>"),
        ("{% set ns = namespace(a=c) %}{{ ns.a }}{% if c %}1{% endif %}", "<<s>>"),
        ("{{ c }}", "nothing special"),
    ],
)
def test_filters_and_tests_see_what_was_typed(template, prompt):
    template = "{% set c = messages[0].content %}" + template
    marked = render_chat(template, mark_tokens(prompt, TOKENS))
    assert unmark(marked) == render_chat(template, prompt)


def test_typed_special_tokens_are_marked_wherever_they_end_up():
    text = "ab <s> <|im_end|> <<s>> a|b"
    marked = mark_tokens(text, TOKENS)
    assert unmark(marked) == text
    shown = "".join(["", marked])
    assert not any(token in shown for token in TOKENS)
    assert mark_tokens("plain", TOKENS) == "plain"
    assert mark_tokens("\U00100061", ["x"]) == "\U00100061"
    with pytest.raises(RequestError, match="private-use"):
        mark_tokens("\U00100061 <s>", TOKENS)


def chat_tokenizer(**roles):
    """Characters, with special tokens of which one takes the blanks after it."""
    words = ["<s>", "</s>", "<|end|>", *"abdnes<>|/ \nAB"]
    plain = hf.Tokenizer(hf.models.BPE({word: i for i, word in enumerate(words)}, []))
    plain.add_special_tokens([*words[:2], hf.AddedToken("<|end|>", rstrip=True)])
    return Tokenizer(plain, roles)


@pytest.mark.parametrize("typed", ["</s>", " <|end|> a", "a</s><|end|>b", "<<s>", "</s<|end|>>"])
def test_the_special_tokens_around_typed_ones_count(typed):
    tokenizer = chat_tokenizer()
    ids = chat_tokens(tokenizer, "<s>{{ messages[0].content }}<|end|>  \n<s>", typed)
    assert ids == [0, *tokenizer.encode(typed), 2, 0]  # blanks after <|end|> are part of it
    assert ids == [*chat_tokens(tokenizer, "<s>{{ messages[0].content }}", typed), 2, 0]


def test_roles_are_the_templates_variables_and_others_are_undefined():
    template = "{{ bos_token }}a{{ eos_token }}{% if pad_token is defined %}b{% endif %}"
    ids = chat_tokens(chat_tokenizer(eos_token="<|end|>", bos_token={"content": "<s>"}), template, "a")
    assert ids == [0, 3, 2]
    assert chat_tokens(chat_tokenizer(pad_token="<s>"), template, "a") == [3, 4]
    # Where no role is known, the end of a text is known by its name.
    assert chat_tokens(chat_tokenizer(), template, "a") == [3, 1]
