"""What is written as GGUF, run by llama.cpp: the same ids, logits and greedy text."""

import ctypes
from pathlib import Path

import jax
import numpy as np
import pytest
from gguf_zoo import MODELS, TEXT, lively, model, tokenizer

from polygpt.generation import Request, Sampler, engine_for, run_all
from polygpt.interop import export_gguf, open_gguf, open_llama2c
from polygpt.model import Model

pytestmark = pytest.mark.llamacpp
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make test-llamacpp)")

TEXTS = [
    TEXT,
    "Hello world",
    "  two  spaces\t\ttab\n\n\nnewlines  ",
    "3.14159 1,000,000 ½ ² ٣٤٥",
    "don't I'LL we've",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 🇩🇪",
    "a\u00a0b",
    "x=1;y=[2]*3 #ok",
    "<|endoftext|> </s>",
    "\r\n\r\n mixed\r",
    "ends in spaces   ",
]


@pytest.fixture(autouse=True)
def silent():
    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    yield
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(0), ctypes.c_void_p(0))


@pytest.fixture
def opened(tmp_path):
    """`opened(config, params, tokenizer, **settings)`: llama.cpp with what was exported."""
    engines = []

    def make(config, params, tokens=None, vocab_only=False, **settings):
        path = tmp_path / f"{len(engines)}.gguf"
        export_gguf(path, config, params, tokens, **settings)
        # Keys and values in float32, or near ties of random weights fall otherwise.
        cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        engine = llama_cpp.Llama(
            str(path), n_ctx=64, logits_all=True, vocab_only=vocab_only, n_threads=1, verbose=False, **cache
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def continued(config, params, ids, count):
    requests = [Request(ids, count, Sampler(temperature=0.0))]
    (handle,) = run_all(engine_for(Model(config), params, requests), requests)
    return handle.tokens


def logits_of(engine, ids) -> np.ndarray:
    engine.reset()
    engine.eval(ids)
    return np.array(engine.scores[: len(ids)])


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_text_are_ours(opened, name):
    config = model(name)
    params = lively(config)
    real = config.vocab_size - config.vocab_padding
    engine = opened(config, params, tokenizer("bpe"))
    ids = np.random.default_rng(1).integers(0, real, 40).tolist()
    ours = np.asarray(jax.jit(Model(config).logits)(params, np.array([ids], np.int32)))[0, :, :real]
    theirs = logits_of(engine, ids)
    error = np.abs(ours - theirs).max() / np.abs(ours).max()
    print(f"{name}: {error:.1e}")
    assert error < (1e-3 if config.feedforward.kind == "mlp" else 1e-4)  # its table of GELU is in 16 bits
    text = continued(config, params, ids[:8], 24)
    found = []
    for token in engine.generate(ids[:8], temp=0.0, top_k=1, reset=True):
        found.append(int(token))
        if len(found) == len(text):
            break
    assert found == text


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 0.01), ("bf16", 0.1), ("q8_0", 0.2)])
def test_smaller_types_run_too(opened, dtype, tolerance):
    config = model("llama")
    engine = opened(config, lively(config), tokenizer("bpe"), dtype=dtype)
    found = open_gguf(Path(engine.model_path))
    ids = list(range(3, 40))
    ours = np.asarray(jax.jit(Model(config).logits)(found.read(config, int), np.array([ids], np.int32)))[0]
    error = np.abs(ours - logits_of(engine, ids)).max() / np.abs(ours).max()
    print(f"{dtype}: {error:.1e}")
    assert error < tolerance  # llama.cpp rounds what comes into a matrix to the matrix's own type


@pytest.mark.parametrize("kind", ["char", "byte", "bpe", "sentencepiece", "smollm", "llama-bpe", "qwen2", "default"])
def test_texts_have_the_same_ids(opened, kind):
    config = model("llama")
    tokens = tokenizer(kind)
    engine = opened(config, lively(config), tokens, vocab_only=True)
    for text in TEXTS:
        if kind == "char":
            text = "".join(char for char in text if char in set(TEXT))
        ids = engine.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == tokens.encode(text), repr(text)
        assert engine.tokenize(text.encode(), add_bos=True, special=False) == [*tokens.start, *ids]
    assert engine.token_eos() == tokens.end_of_text


def test_a_published_model_tells_the_same_story(opened, shared_data):
    found = open_llama2c(shared_data / "stories260K" / "stories260K.bin")
    params = found.read(found.config, int)
    engine = opened(found.config, params, found.tokenizer)
    for text in [*TEXTS, "Once upon a time"]:
        ids = engine.tokenize(text.encode(), add_bos=True, special=False)
        assert ids == [*found.tokenizer.start, *found.tokenizer.encode(text)], repr(text)
    story = found.tokenizer.decode(ids[1:] + continued(found.config, params, ids, 56))
    out = engine.create_completion("Once upon a time", max_tokens=56, temperature=0.0)
    assert "Once upon a time" + out["choices"][0]["text"] == story
