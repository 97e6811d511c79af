"""Constraints: what a model of random weights writes is what was asked for."""

import contextlib
import json
import random
import re
import time

import jax
import numpy as np
import pytest

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.generation import Request, Sampler
from polygpt.generation.constrained import generate_constrained
from polygpt.generation.constraints import Matcher, Vocabulary, as_grammar
from polygpt.loading import build
from polygpt.model import Model, ModelConfig
from polygpt.tokenizers import load_tokenizer

pytest.importorskip("llguidance", reason="llguidance is not installed (pip install 'polygpt[constraints]')")

FIELDS = {
    "vocab_size": 256,
    "context_length": 512,
    "embed_dim": 16,
    "num_layers": 1,
    "position": "rope",
    "norm": "rmsnorm",
    "attention": {"kind": "softmax", "num_heads": 2},
    "feedforward": {"kind": "mlp", "mlp_dim": 16},
}


@pytest.fixture(scope="module")
def bytes_():
    return Vocabulary([bytes([byte]) for byte in range(256)], [], None, lambda text: list(text.encode()))


@pytest.fixture(scope="module")
def write(bytes_):
    model = Model(validate(ModelConfig, FIELDS))
    drawn = np.random.default_rng(0)
    params = jax.tree.map(
        lambda info: ((info.inputs is None) + 0.5 * drawn.standard_normal(info.shape)).astype("float32"),
        model.parameters,
    )

    def call(seed=0, count=400, **constraint):
        request = Request(list(b"x"), count, Sampler(), seed=seed)
        pieces = list(generate_constrained(model, params, request, Matcher(bytes_, as_grammar(**constraint))))
        text = bytes(token for piece in pieces for token in piece.tokens).decode("utf-8", "replace")
        return text, pieces[-1].finish_reason, len(pieces)

    return call


@pytest.mark.parametrize("regex", [r"[a-c]{3,5}-[0-9]{2}", "yes|no", "é+ö", r"\(\)"])
def test_a_regular_expression(write, regex):
    for seed in range(3):
        text, reason, _ = write(seed, count=60, regex=regex)
        assert re.fullmatch(regex, text) or (reason == "length" and len(text) >= 30)


def test_choices(write):
    found = {write(seed, choices=["red (1)", "green", "blue|"])[:2] for seed in range(12)}
    assert found <= {("red (1)", "stop"), ("green", "stop"), ("blue|", "stop")}
    assert len(found) > 1


def test_a_grammar(write):
    text, reason, _ = write(grammar='start: "a" (item ",")~2 "z"\nitem: "x" | "yy"')
    assert (text in {f"a{p},{q},z" for p in ("x", "yy") for q in ("x", "yy")}, reason) == (True, "stop")


def test_forced_tokens_are_not_sampled_one_by_one(write):
    text, reason, pieces = write(regex="the one and only answer: [ab]")
    assert reason == "stop"
    assert len(text) == 26
    assert pieces <= 4


def schema_of(rng, depth=0):
    kinds = ["integer", "boolean", "null", "string", "enum"] + ["object", "array"] * (depth < 2)
    kind = rng.choice(kinds)
    if kind == "object":
        names = rng.sample("abcdef", rng.randint(1, 3))
        properties = {name: schema_of(rng, depth + 1) for name in names}
        return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": schema_of(rng, depth + 1), "minItems": rng.randint(0, 2), "maxItems": 3}
    if kind == "enum":
        return {"enum": rng.sample(["x", 1, None, True, "yes"], 2)}
    bounds = {"integer": {"minimum": -5, "maximum": 90}, "string": {"minLength": 1, "maxLength": 4}}
    return {"type": kind, **bounds.get(kind, {})}


@pytest.mark.parametrize("count", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_generated_schemas(write, count):
    jsonschema = pytest.importorskip("jsonschema")
    rng, complete = random.Random(0), 0
    for seed in range(count):
        schema = schema_of(rng)
        text, reason, _ = write(seed, schema=schema)
        assert reason in ("stop", "length")
        if reason == "stop":
            jsonschema.validate(json.loads(text), schema)
            complete += 1
    assert complete > 0.8 * count


@pytest.mark.parametrize(
    ("constraint", "word"),
    [
        ({"schema": "{"}, "not JSON"),
        ({"schema": 3}, "object"),
        ({"schema": {"type": "nonsense"}}, "schema"),
        ({"schema": False}, "cannot be"),
        ({"regex": "(a"}, "regex"),
        ({"regex": 3}, "text"),
        ({"choices": []}, "choices"),
        ({"grammar": "start: nothing"}, "grammar"),
        ({"regex": "a", "choices": ["b"]}, "one constraint"),
    ],
)
def test_after_a_constraint_that_is_refused_the_next_is_followed(write, constraint, word):
    with pytest.raises(RequestError, match=word) as caught:
        write(**constraint)
    assert len(str(caught.value).splitlines()) == 1
    assert write(regex="ab")[:2] == ("ab", "stop")


def test_a_language_model_and_the_command_follow_constraints(run, program):
    from polygpt import load

    lm = load(run)
    found = lm.generate(["the ", "a "], choices=["cat", "the"], max_new_tokens=6)
    assert {done.text for done in found} <= {"cat", "the"}
    assert {done.finish_reason for done in found} == {"stop"}
    done = program("generate", run, "--prompt", "the ", "--regex", "(at|he)!?", "--max-new-tokens", "4", "--json")
    assert re.fullmatch("(at|he)!?", json.loads(done.out)["text"])
    done = program("generate", run, "--prompt", "the ", "--regex", "(at")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    with pytest.raises(RequestError, match="beam search takes no constraint"):
        lm.generate("the ", beams=2, regex="a")


# Each doubles with every letter of its size: as a table of states none would fit into memory.
EXPONENTIAL = {
    "a regular expression of many states": {"regex": "(a|b)*a(a|b){40}"},
    "repeated repetitions": {"regex": "((a{1,500}){1,500}){1,500}"},
    "gaps within gaps": {"regex": "(.*a.{30}){20}"},
    "an ambiguous grammar": {"grammar": 'start: e\ne: e e | e e e | "a" | "b"'},
    "references that double": {
        "schema": {
            "$ref": "#/$defs/d0",
            "$defs": {"d40": {"type": "null"}}
            | {
                f"d{i}": {"properties": {name: {"$ref": f"#/$defs/d{i + 1}"} for name in "ab"}, "required": ["a", "b"]}
                for i in range(40)
            },
        }
    },
}


@pytest.mark.parametrize("name", EXPONENTIAL)
def test_a_constraint_of_exponential_size_is_followed_or_refused_in_time(write, name):
    began = time.monotonic()
    refused = pytest.raises(RequestError, match=r"^the constraint cannot be followed: lexer error[^\n]*$")
    with refused if name == "repeated repetitions" else contextlib.nullcontext():
        assert write(count=30, **EXPONENTIAL[name])[1] in ("length", "stop")
    assert time.monotonic() - began < 20  # half a second where nothing else runs
    assert write(regex="ab")[:2] == ("ab", "stop")


LANGUAGE = 'the cat sat on a mat. é ö 日本 {} " 0 1 2 3'


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback"])
def wide(request):
    """A vocabulary whose tokens are several characters, or parts of one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if request.param == "byte-level":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
        made.train_from_iterator([LANGUAGE] * 9, trainer)
    else:
        pieces = ["<unk>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"theca", "▁t", "he", "▁the"]
        numbers = {piece: number for number, piece in enumerate(pieces)}
        merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
        made = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        made.add_special_tokens(["<end>"])
    return made


def test_constraints_follow_the_bytes_of_every_kind_of_vocabulary(wide, tmp_path):
    """Characters that are no token of their own are written byte by byte, and spaces are spaces."""
    wide.save(str(tmp_path / "tokenizer.json"))
    lm = build(validate(ModelConfig, FIELDS | {"vocab_size": wide.get_vocab_size()}), 3, load_tokenizer(tmp_path))
    for seed in range(4):
        found = lm.generate("the", regex="( the){1,2} (日本|é+ö) [0-9]{3}", seed=seed, max_new_tokens=60)
        assert found.finish_reason in ("stop", "length")
        assert found.finish_reason == "length" or re.fullmatch("( the){1,2} (日本|é+ö) [0-9]{3}", found.text)
    found = lm.generate("the", choices=["日本 the", "the cat"], max_new_tokens=60)
    assert (found.text in {"日本 the", "the cat"}, found.finish_reason) == (True, "stop")
    found = lm.generate("the", schema={"enum": ["日本", "é"]}, max_new_tokens=60)
    assert json.loads(found.text) in ("日本", "é")
    assert wide.token_to_id("<end>") not in found.tokens
