"""llama2.c's first format: a published model, its layout value by value, and damage of every kind."""

import itertools
import struct

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygpt.errors import RequestError
from polygpt.generation import Request, Sampler, engine_for, run_all
from polygpt.interop.llama2c import open_llama2c
from polygpt.model import Model

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, CONTEXT, VOCABULARY = 8, 12, 2, 2, 1, 6, 260
HEADER = [DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCABULARY, CONTEXT]
PIECES = ["<unk>", "\n<s>\n", "\n</s>\n", *[f"<0x{byte:02X}>" for byte in range(256)], " "]
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\nLily"
)


def weights(tied: bool) -> dict[str, np.ndarray]:
    """The tensors of a file in their order, random."""
    narrow = DIM * KV_HEADS // HEADS
    shapes = {
        "embedding": (VOCABULARY, DIM),
        "attention_norm": (LAYERS, DIM),
        "wq": (LAYERS, DIM, DIM),
        "wk": (LAYERS, narrow, DIM),
        "wv": (LAYERS, narrow, DIM),
        "wo": (LAYERS, DIM, DIM),
        "mlp_norm": (LAYERS, DIM),
        "w1": (LAYERS, HIDDEN, DIM),
        "w2": (LAYERS, DIM, HIDDEN),
        "w3": (LAYERS, HIDDEN, DIM),
        "final_norm": (DIM,),
        "cos": (CONTEXT, DIM // HEADS // 2),
        "sin": (CONTEXT, DIM // HEADS // 2),
    } | ({} if tied else {"head": (VOCABULARY, DIM)})
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def tokenizer_bytes(pieces, scores=None) -> bytes:
    scores = scores or [0.0] * len(pieces)
    encoded = [piece.encode() for piece in pieces]
    parts = [struct.pack("<fi", score, len(piece)) + piece for score, piece in zip(scores, encoded, strict=True)]
    return struct.pack("<i", max(map(len, encoded))) + b"".join(parts)


@pytest.fixture
def write(tmp_path):
    """`write(tied=True, tokenizer=None)`: a file of the format."""

    def make(tied: bool = True, tokenizer: bytes | None = None):
        path = tmp_path / "model.bin"
        header = [*HEADER[:5], VOCABULARY if tied else -VOCABULARY, CONTEXT]
        path.write_bytes(struct.pack("<7i", *header) + b"".join(w.tobytes() for w in weights(tied).values()))
        if tokenizer is not None:
            (tmp_path / "tok260.bin").write_bytes(tokenizer)
        return path

    return make


@pytest.fixture(scope="session")
def stories(shared_data):
    return open_llama2c(shared_data / "stories260K" / "stories260K.bin")


def test_a_published_model_gives_its_ids_and_its_story(stories):
    tokenizer = stories.tokenizer
    ids = [*tokenizer.start, *tokenizer.encode("Once upon a time")]
    assert ids == [1, 403, 407, 261, 378]
    assert (tokenizer.end_of_text, stories.stop_tokens, stories.config.head) == (2, (2,), "tied")
    params = stories.read(stories.config, int)
    requests = [Request(ids, 70, Sampler(temperature=0.0))]
    (handle,) = run_all(engine_for(Model(stories.config), params, requests), requests)
    assert tokenizer.decode(ids[1:] + handle.tokens).startswith(STORY)


def merge_best(text: str, scores: dict[str, float], ids: dict[str, int]) -> list[int]:
    """llama2.c's `encode`, as slow and as plain as it is there."""
    parts = [char if char in ids else byte for char in f"▁{text}".replace(" ", "▁") for byte in _or_bytes(char, ids)]
    while True:
        found = [(-scores.get(a + b, -np.inf), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        cost, place = min(found, default=(np.inf, 0))
        if cost == np.inf:
            return [ids[part] for part in parts]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def _or_bytes(char: str, ids) -> list[str]:
    return [char] if char in ids else [f"<0x{byte:02X}>" for byte in char.encode()]


@pytest.fixture(scope="session")
def scored(shared_data):
    """The pieces of the published tokenizer with their scores, and all ids."""
    data, place, pieces = (shared_data / "stories260K" / "tok512.bin").read_bytes(), 4, []
    while place < len(data):
        score, length = struct.unpack_from("<fi", data, place)
        pieces.append((data[place + 8 : place + 8 + length].decode().replace(" ", "▁"), score))
        place += 8 + length
    return dict(pieces[259:]), {piece: i for i, (piece, _) in enumerate(pieces)}


@given(st.text(min_size=1) | st.text("the wasLily, .\n", min_size=1, max_size=60))
def test_encoding_merges_the_best_scoring_neighbours(stories, scored, text):
    assert stories.tokenizer.encode(text) == merge_best(text, *scored)
    # What was typed as a special token, or as the sign that stands for a space, cannot be told from it afterwards.
    assert stories.tokenizer.decode(stories.tokenizer.encode(text)) == text.replace("▁", " ")


def test_special_tokens_in_a_text_are_ordinary_text(stories):
    ids = stories.tokenizer.encode("<s> a </s><unk>")
    assert not {0, 1, 2} & set(ids)
    assert stories.tokenizer.encode("<s>", special=True)[-1] == 1


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_lands_in_its_place(write, tied):
    found = open_llama2c(write(tied))
    params, theirs = found.read(found.config, int), weights(tied)
    assert found.config.head == ("tied" if tied else "untied")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == Model(found.config).num_parameters
    np.testing.assert_array_equal(params["embedding"], theirs["embedding"])
    np.testing.assert_array_equal(params["final_norm"]["gain"], theirs["final_norm"])
    if not tied:
        np.testing.assert_array_equal(params["head"], theirs["head"].T)
    layers = params["blocks"][0]
    size = DIM // HEADS
    # Pairs that turn together are neighbours there, and half a head apart here.
    order = [*range(0, size, 2), *range(1, size, 2)]
    for name, w, heads in (("query", "wq", HEADS), ("key", "wk", KV_HEADS)):
        turned = theirs[w].reshape(LAYERS, heads, size, DIM)[:, :, order].transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(layers["attention"][name], turned)
    value = theirs["wv"].reshape(LAYERS, KV_HEADS, size, DIM).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(layers["attention"]["value"], value)
    out = theirs["wo"].transpose(0, 2, 1).reshape(LAYERS, HEADS, size, DIM)
    np.testing.assert_array_equal(layers["attention"]["out"], out)
    for name, w in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        np.testing.assert_array_equal(layers["feedforward"][name], theirs[w].transpose(0, 2, 1))
    for name, w in (("attention_norm", "attention_norm"), ("feedforward_norm", "mlp_norm")):
        np.testing.assert_array_equal(layers[name]["gain"], theirs[w])


def test_a_model_without_a_tokenizer_beside_it_has_none(write):
    assert open_llama2c(write()).tokenizer is None
    assert open_llama2c(write(tokenizer=tokenizer_bytes(PIECES))).tokenizer.vocab_size == VOCABULARY


@pytest.mark.parametrize("size", [0, 1, 27, 28, 29, 1000, -4, -1])
def test_a_file_cut_off_is_refused(write, size):
    path = write()
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RequestError, match=r"model\.bin: .*(bytes|too few)"):
        open_llama2c(path)


def test_a_longer_file_is_refused(write):
    path = write()
    path.write_bytes(path.read_bytes() + b"1234")
    with pytest.raises(RequestError, match=r"not in llama2\.c's first format"):
        open_llama2c(path)


@given(place=st.integers(0, 6), value=st.integers(-(2**31), 2**31 - 1))
def test_no_header_does_harm(tmp_path_factory, place, value):
    numbers = list(HEADER)
    if numbers[place] == value or (place == 5 and value == -VOCABULARY):
        return
    numbers[place] = value
    path = tmp_path_factory.mktemp("header") / "model.bin"
    body = b"".join(w.tobytes() for w in weights(True).values())
    path.write_bytes(struct.pack("<7i", *numbers) + body)
    with pytest.raises(RequestError) as error:
        open_llama2c(path)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 tokens"),
        (tokenizer_bytes(PIECES)[:-3], "truncated|not UTF-8"),
        (tokenizer_bytes(PIECES[:-1]), "259 tokens, but the model has 260"),
        (tokenizer_bytes([*PIECES, "x"]), "more tokens"),
        (tokenizer_bytes([*PIECES[:-1], "<unk>"]), "duplicate token '<unk>'"),
        (tokenizer_bytes(PIECES, [float("nan")] * VOCABULARY), "not finite"),
        (tokenizer_bytes(PIECES)[:-9] + struct.pack("<fi", 0.0, 1) + b"\xff", "not UTF-8"),
        (tokenizer_bytes(PIECES)[:-9] + struct.pack("<fi", 0.0, -1) + b" ", "truncated"),
        (tokenizer_bytes(PIECES)[:-9] + struct.pack("<fi", 0.0, 2**31 - 1) + b" ", "truncated"),
    ],
)
def test_a_damaged_tokenizer_is_refused_by_name(write, data, reason):
    with pytest.raises(RequestError, match=rf"tok260\.bin: .*({reason})"):
        open_llama2c(write(tokenizer=data))


def test_what_is_no_such_file_is_refused(tmp_path):
    with pytest.raises(RequestError, match="cannot be read"):
        open_llama2c(tmp_path / "none.bin")
    with pytest.raises(RequestError, match="cannot be read"):
        open_llama2c(tmp_path)
    newer = tmp_path / "newer.bin"
    newer.write_bytes(struct.pack("<7i", 0x616B3432, 1, 1, 1, 1, 1, 1))
    with pytest.raises(RequestError, match="--version 0"):
        open_llama2c(newer)
