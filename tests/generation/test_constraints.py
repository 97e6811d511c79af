"""Constraints: what a model of random weights writes is what was asked for."""

import contextlib
import json
import random
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.generation import Constraint, Engine, Request, Sampler, Vocabulary, as_grammar
from polygpt.generation.constraints import Matcher
from polygpt.loading import build
from polygpt.model import Model, ModelConfig
from polygpt.tokenizers import load_tokenizer

pytest.importorskip("llguidance", reason="llguidance is not installed (pip install 'polygpt[constraints]')")

SAMPLED = Sampler()
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
def engine():
    model = Model(validate(ModelConfig, FIELDS))
    drawn = np.random.default_rng(0)
    params = jax.tree.map(
        lambda info: jnp.asarray((info.inputs is None) + 0.5 * drawn.standard_normal(info.shape), jnp.float32),
        model.parameters,
    )
    return Engine(model, params, slots=4)


@pytest.fixture(scope="module")
def write(bytes_, engine):
    def call(seed=0, count=400, sampler=SAMPLED, **constraint):
        given = Constraint(bytes_, as_grammar(**constraint))
        handle = engine.submit(Request(list(b"x"), count, sampler, seed=seed, constraint=given)).result()
        return bytes(handle.tokens).decode("utf-8", "replace"), handle.finish_reason, handle

    return call


@pytest.mark.parametrize("regex", [r"[a-c]{3,5}-[0-9]{2}", "yes|no", "é+ö", r"\(\)"])
def test_a_regular_expression(write, regex):
    for seed in range(3):
        text, reason, _ = write(seed, count=60, regex=regex)
        assert re.fullmatch(regex, text) or (reason == "length" and len(text) >= 30)


def test_choices(write):
    found = {write(seed, choices=["red (1)", "green", "blue|"])[:2] for seed in range(60)}
    assert found <= {("red (1)", "stop"), ("green", "stop"), ("blue|", "stop")}
    assert len(found) > 1


def test_a_grammar_of_llama_cpp(write):
    text, reason, _ = write(grammar='root ::= "a" (item ","){2} "z" # twice\nitem ::= "x" | "yy"')
    assert reason == "stop"
    assert re.fullmatch(r"a((x|yy),){2}z", text)


def test_a_grammar(write):
    text, reason, _ = write(grammar='start: "a" (item ",")~2 "z"\nitem: "x" | "yy"')
    assert (text in {f"a{p},{q},z" for p in ("x", "yy") for q in ("x", "yy")}, reason) == (True, "stop")


def test_forced_tokens_are_not_sampled_one_by_one(write, engine):
    before = engine.statistics
    text, reason, _ = write(regex="the one and only answer: [ab]")
    after = engine.statistics
    assert (text[:-1], reason) == ("the one and only answer: ", "stop")
    assert after.tokens - before.tokens == 26
    assert after.steps - before.steps == 1
    for forced in (1, 3, 4, 16, 17, 31, 40):  # around the numbers that are appended at once
        assert write(regex="a" * forced)[:2] == ("a" * forced, "stop")
        assert write(count=forced - 1 or 1, regex="a" * forced + "b")[:2] == ("a" * (forced - 1 or 1), "length")


def test_forced_tokens_are_read_as_if_they_had_been_sampled(engine, bytes_, write):
    """What follows them is what follows if they are in the prompt; log probabilities are given one by one."""
    forced, most = "abcdefghijklmnopqrstuvwxyz", 12
    constraint = Constraint(bytes_, as_grammar(regex=forced + "[0-9]{12}"))
    for cut in (0, 3, 20):
        prompt = list(b"x" + forced[:cut].encode())
        rest = Constraint(bytes_, as_grammar(regex=forced[cut:] + "[0-9]{12}"))
        handle = engine.submit(Request(prompt, 26 - cut + most, SAMPLED, 3, constraint=rest)).result()
        assert bytes(handle.tokens).decode() == write(3, 38, regex=forced + "[0-9]{12}")[0][cut:]
    scored = engine.submit(Request(list(b"x"), 38, SAMPLED, 3, logprobs=2, constraint=constraint)).result()
    assert bytes(scored.tokens).decode() == write(3, 38, regex=forced + "[0-9]{12}")[0]
    assert len(scored.logprobs) == 38
    tokens = jnp.array([[*b"x", *scored.tokens]], jnp.int32)
    full = np.asarray(jax.nn.log_softmax(engine.model.logits(engine.params, tokens)[0, :-1]))
    found = [score.logprob for score in scored.logprobs]
    np.testing.assert_allclose(found, full[np.arange(38), scored.tokens], atol=1e-5)


def test_constrained_requests_change_nothing_for_their_neighbours_nor_they_for_them(engine, bytes_):
    """To the bit, in all slots and in any company."""
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"]}
    given = [None, {"regex": "the answer: [a-f]{3,9}"}, None, {"schema": schema}, {"choices": ["red", "green"]}]
    requests = []
    for number in range(20):
        asked = given[number % 5]
        constraint = None if asked is None else Constraint(bytes_, as_grammar(**asked))
        sampler = [SAMPLED, Sampler(temperature=0.0, repetition_penalty=1.2)][number % 2]
        logprobs = [None, 2, None][number % 3]
        requests.append(Request(list(b"so"), 30, sampler, number, (), logprobs, constraint))

    def outcome(handle):
        handle.result()
        return handle.tokens, handle.logprobs, handle.finish_reason

    alone = [outcome(engine.submit(request)) for request in requests]
    together = [engine.submit(request) for request in requests]
    assert [outcome(handle) for handle in together] == alone
    handles = {number: engine.submit(requests[number]) for number in reversed(range(20))}
    assert [outcome(handles[number]) for number in range(20)] == alone


def test_white_space_for_ever_ends_at_the_limit_and_a_grammar_is_stronger_than_penalties(write):
    love = Sampler(temperature=0.0, logit_bias={32: 1000.0, 10: 900.0})
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    text, reason, _ = write(sampler=love, count=200, schema=schema)
    assert reason == "length" or json.loads(text)
    banned = Sampler(temperature=0.0, no_repeat_ngram=1)
    assert write(sampler=banned, regex="ab[ab]a[ab]")[1] == "stop"


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


@pytest.mark.parametrize(("count", "least"), [(15, 9), pytest.param(200, 160, marks=pytest.mark.slow)])
def test_generated_schemas(write, count, least):
    jsonschema = pytest.importorskip("jsonschema")
    rng, complete = random.Random(0), 0
    for seed in range(count):
        schema = schema_of(rng)
        text, reason, _ = write(seed, schema=schema)
        assert reason in ("stop", "length")
        if reason == "stop":
            jsonschema.validate(json.loads(text), schema)
            complete += 1
    assert complete > least


@pytest.mark.parametrize(
    ("constraint", "word"),
    [
        ({"schema": "{"}, "not JSON"),
        ({"schema": 3}, "object"),
        ({"schema": {"type": "nonsense"}}, "schema"),
        ({"schema": False}, "cannot be"),
        ({"regex": "(a"}, r"^the regex cannot be used: unclosed group, at character 1 of the regular expression \(a$"),
        ({"regex": "é)("}, "unopened group, at character 2 of"),
        ({"regex": ")("}, "unopened group, at character 1 of"),
        ({"regex": "a\\\\\\"}, "ends with a backslash"),
        ({"regex": r'"\b'}, r'^the regex cannot be used: lookarounds .* in regex /"\\b/$'),
        ({"regex": "fuel too big("}, "used: unclosed group"),
        ({"schema": {"properties": {"a": {"type": "string", "pattern": "x[z-a]"}}}}, "range, .*, at character 3 of"),
        ({"schema": []}, r"an object, true or false, not \[\]"),
        ({"grammar": "start: X\nX: /(/"}, "^the grammar cannot be used: line 2, column 4: unclosed group"),
        ({"grammar": 'start: "a'}, "^the grammar cannot be used: line 1, column 10: lexer error$"),
        ({"grammar": 'root ::= "a'}, "^the grammar cannot be used: as GBNF, Unexpected end of input at line 1$"),
        ({"grammar": "root ::= item"}, "^the grammar cannot be used: .*item"),
        ({"grammar": 'start: "a" start'}, "^the constraint cannot be followed: the text that it forces never ends"),
        ({"grammar": 'start: "a" b\nb: "c" start'}, "never ends"),
        ({"grammar": r'start: "a" /[^\s\S]/'}, "no text matches"),
        ({"regex": 3}, "text"),
        ({"regex": r"[^\s\S]"}, "no text matches"),
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
    refused = pytest.raises(RequestError, match=r"^the constraint cannot be followed: it is too complex [^\n]*repeat")
    with refused if name == "repeated repetitions" else contextlib.nullcontext():
        assert write(count=30, **EXPONENTIAL[name])[1] in ("length", "stop")
    assert time.monotonic() - began < 20  # half a second where nothing else runs
    assert write(regex="ab")[:2] == ("ab", "stop")


def test_an_ambiguous_grammar_is_refused_before_a_token_takes_long():
    """The engine's thread computes what may come next, so all requests wait for it."""
    words = [b"abcdefghijkl"[:length] * times for length in range(1, 12) for times in range(1, 4)]
    vocabulary = Vocabulary(
        [bytes([byte]) for byte in range(256)] + words[1:], [], None, lambda text: list(text.encode())
    )
    matcher = Matcher(Constraint(vocabulary, as_grammar(grammar="start: e\ne: e e | e e e | /[a-z ]/")))

    def follow():
        for _ in range(60):
            matcher.allowed(9)
            matcher.take(list(b"a"))

    with pytest.raises(RequestError, match=r"too many ways .* write lists as item\*"):
        follow()


def test_a_constraint_is_compiled_once_for_all_that_share_it(bytes_, engine, monkeypatch):
    """When it is made: no thread that submits or steps waits for that."""
    import llguidance

    made = Constraint(bytes_, as_grammar(regex="(yes|no), [a-z]{2}"))
    monkeypatch.setattr(llguidance, "LLMatcher", None)
    handles = [engine.submit(Request(list(b"x"), 20, SAMPLED, seed, constraint=made)) for seed in range(3)]
    for handle in handles:
        assert re.fullmatch("(yes|no), [a-z]{2}", bytes(handle.result().tokens).decode())


LANGUAGE = 'the cat sat on a mat. é ö 日本 {} " 0 1 2 3'


@pytest.fixture(scope="module", params=["byte-level", "bytes-missing", "byte-fallback"])
def wide(request):
    """A vocabulary whose tokens are several characters, or parts of one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if request.param != "byte-fallback":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet() if request.param == "byte-level" else []
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
