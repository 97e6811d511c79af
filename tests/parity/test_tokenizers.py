"""Tokenizers and chat templates against transformers itself."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed (make test-parity installs it)")
pytest.importorskip("transformers", reason="transformers is not installed (make test-parity installs it)")

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from polygpt.tokenizers import TokenizerConfig, chat_tokens, load_tokenizer, render_chat, train_tokenizer

pytestmark = pytest.mark.parity
TEXT = "Hi 12345 there, don't I'LL cafe\u0301 au lait "
TRAINED = train_tokenizer(TokenizerConfig(vocab_size=300), [TEXT * 9])
TEXTS = [TEXT, " x  y\n\n", "<|im_start|>user\nHi<|im_end|>", "a<|endoftext|>b", "<s>Hi</s> <pad>", "!", ""]
END = {"content": "</s>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
NAMED = {**END, "__type": "AddedToken"}
SETTINGS = {
    "nothing": {},
    "prefix": {"add_prefix_space": True},
    "start": {"add_bos_token": True, "bos_token": "<s>"},
    "start in the vocabulary": {"add_bos_token": True, "bos_token": "!"},
    "no start": {"add_bos_token": True, "bos_token": None, "unk_token": None},
    "roles": {"eos_token": NAMED, "pad_token": "<pad>", "bos_token": "<s>"},
    "more": {"additional_special_tokens": ["<|im_end|>"]},
    "roles and more": {"pad_token": "<pad>", "bos_token": "<s>", "extra_special_tokens": ["<x>", "<|im_start|>"]},
    "listed": {"added_tokens_decoder": {str(TRAINED.vocab_size): END | {"special": True}}, "eos_token": "</s>"},
}
TYPES = ["gpt2", "gpt_neo", "gptj", "codegen", "phi", "starcoder2", "gpt_neox", "olmo", "olmoe", "qwen2", "qwen3"]
CLASSES = ["GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer"]


def write(folder: Path, **files) -> Path:
    """vocab.json and merges.txt, with JSON files beside them."""
    model = json.loads(TRAINED.to_json())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    vocab = model["vocab"] | {"<|endoftext|>": TRAINED.end_of_text}
    for name, value in {"vocab": vocab, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def check(folder: Path) -> None:
    """The ids are theirs, and so are those of the roles that are in the vocabulary."""
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert [*ours.start, *ours.encode(text, special=True)] == theirs(text)["input_ids"], text
    for role in ("bos_token", "eos_token", "pad_token"):
        # A class's default that a vocabulary lacks is not added here.
        if getattr(theirs, role) != "<|padding|>":
            assert ours.role(role) == getattr(theirs, f"{role}_id"), role


@pytest.mark.parametrize("model_type", TYPES)
def test_vocab_and_merges_of_a_model_type(tmp_path, model_type):
    check(write(tmp_path, config={"model_type": model_type}))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", CLASSES)
def test_vocab_and_merges_of_a_class(tmp_path, name, settings):
    for model_type in ("gpt2", "llama", "qwen2"):
        config = {"tokenizer_class": name, **settings}
        check(write(tmp_path, config={"model_type": model_type}, tokenizer_config=config))


@pytest.mark.parametrize("beside", ["added_tokens", "special_tokens_map"])
def test_older_files_beside(tmp_path, beside):
    size = TRAINED.vocab_size
    files = {"added_tokens": {"</s>": size, "<pad>": size + 1}}
    if beside == "special_tokens_map":
        files[beside] = {"eos_token": {**END, "lstrip": False}, "pad_token": "<pad>"}
    check(write(tmp_path, config={"model_type": "gpt2"}, tokenizer_config={"bos_token": "<|endoftext|>"}, **files))


TEMPLATES = [
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}x{% endgeneration %}{% endif %}{% endfor %}",
    "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ {'b': '<', 'a': [1]} | tojson(sort_keys=true) }}",
    "{{ bos_token }}{{ messages[0].content | trim }}{{ eos_token }}{{ pad_token }}",
    "{{ bos_token is defined }}{{ pad_token is defined }}{{ unk_token is defined }}{{ documents is none }}",
    "{{ tools is none }}{{ add_generation_prompt }}{{ messages[0].content | upper | replace('A', 'b') | length }}",
    "  {%- set ns = namespace(x=1) -%}\n  {% for i in range(3) %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}\n",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", ["Hi", "  a <b> & 'c' é 你 \n", "a </s> b"])
def test_templates_give_their_text(template, prompt):
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    messages = [[{"role": "user", "content": prompt}]]
    theirs, _ = render_jinja_template(messages, chat_template=template, add_generation_prompt=True, **named)
    assert render_chat(template, prompt, named) == theirs[0]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", ["Hi", " é "])
def test_templates_give_their_ids(tmp_path, template, prompt):
    roles = {"tokenizer_class": "GPT2Tokenizer", "eos_token": NAMED, "bos_token": "<s>", "unk_token": None}
    folder = write(tmp_path, config={"model_type": "gpt2"}, tokenizer_config=roles)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": prompt}]
    settings = {"chat_template": template, "add_generation_prompt": True, "return_dict": False}
    ids = theirs.apply_chat_template(messages, **settings)
    assert chat_tokens(load_tokenizer(folder), template, prompt) == ids
