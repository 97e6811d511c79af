"""The tables of names: what a tensor's parts give, put together again, is the tensor."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given
from hypothesis import strategies as st

from polygpt.config import validate
from polygpt.interop.names import ForeignTensor, Layout, Piece, foreign_tensors
from polygpt.interop.same import differences
from polygpt.model import Model, ModelConfig

SIZES = st.integers(1, 5)


@st.composite
def fused(draw):
    """A tensor of one or several pieces of one parameter stack each, and arrays that hold them."""
    inputs, outputs_first = draw(st.sampled_from([None, 0, 1, 2])), draw(st.booleans())
    interleaved = inputs in (None, 1) and draw(st.booleans())
    stack = draw(st.lists(SIZES, max_size=2))
    before = [draw(SIZES) for _ in range(inputs or 0)]
    count = 1 if inputs in (0, 2) else draw(st.integers(1, 3))
    pieces, arrays = [], {}
    for number in range(count):
        after = [draw(SIZES), 2 * draw(SIZES)] if inputs in (None, 1) else [draw(SIZES)]
        after = [draw(SIZES), *after] if inputs == 0 else after
        path, index = ("p", number), tuple(draw(st.integers(0, n - 1)) for n in stack)
        pieces.append(Piece(path, index, (*before, *after) if inputs else tuple(after), inputs, interleaved))
        size = np.prod([*stack, *pieces[-1].shape], dtype=int)
        arrays[path] = np.random.default_rng(number).standard_normal(size).reshape(*stack, *pieces[-1].shape)
    if inputs == 0:
        pieces = [Piece(p.path, p.index, p.shape[-2:], 0, False) for p in pieces]
        arrays = {p.path: arrays[p.path].reshape(*stack, -1, p.shape[-1])[..., : p.shape[0], :] for p in pieces}
    return ForeignTensor("t", tuple(pieces), outputs_first), arrays


@given(fused())
def test_what_is_joined_is_split_again(case):
    tensor, arrays = case
    whole = tensor.join(arrays.__getitem__)
    assert whole.shape == tensor.shape
    found = dict.fromkeys(arrays)
    for piece, values in tensor.split(whole):
        assert np.array_equal(values, piece.within(arrays[piece.path]))
        found[piece.path] = values
    assert all(values is not None for values in found.values())


def test_a_linear_layer_is_turned_and_conv1d_is_not():
    ours = np.arange(24.0).reshape(1, 2, 3, 4)  # layers, D, N, H
    piece = Piece(("q",), (0,), (2, 3, 4), 1, False)
    turned, plain = (ForeignTensor("t", (piece,), first).join(lambda _: ours) for first in (True, False))
    assert turned.shape == (12, 2)
    assert np.array_equal(turned, plain.T)
    assert np.array_equal(plain, ours.reshape(2, 12))


def test_rotary_pairs_that_are_neighbours_are_put_apart():
    ours = np.array([[0.0, 1, 2, 10, 11, 12]])  # D=1, one head of 6: pairs (i, i + 3)
    piece = Piece(("q",), (), (1, 1, 6), 1, True)
    tensor = ForeignTensor("t", (piece,), True)
    assert tensor.join(lambda _: ours.reshape(1, 1, 6))[:, 0].tolist() == [0, 10, 1, 11, 2, 12]


def test_layers_and_experts_are_counted_through():
    fields = {
        "vocab_size": 10,
        "vocab_padding": 3,
        "context_length": 4,
        "embed_dim": 4,
        "num_layers": 3,
        "position": "rope",
        "norm": "rmsnorm",
        "attention": {"kind": "softmax", "num_heads": 2},
        "feedforward": {"kind": "moe", "mlp_dim": 3, "num_experts": 2, "top_k": 1},
        "pattern": [{}, {"attention": {"window": 2}}],
    }
    model = Model(validate(ModelConfig, fields))
    table = {"e": "embedding", "l{layer}.{expert}.up": "blocks.feedforward.up"}
    with pytest.raises(KeyError, match=r"blocks\."):
        foreign_tensors(model, table, Layout())
    paths = {f"blocks.{path[2]}.{path[3]}" for path in flatten_dict(model.parameters) if path[0] == "blocks"}
    table |= {f"l{{layer}}.{path}": path for path in paths if not path.startswith("blocks.feedforward.")}
    table |= {f"l{{layer}}.{{expert}}.{part}": f"blocks.feedforward.{part}" for part in ("gate", "down")}
    table |= {"l{layer}.router": "blocks.feedforward.router", "n": "final_norm.gain"}
    tensors = {tensor.name: tensor for tensor in foreign_tensors(model, table, Layout())}
    assert tensors["e"].shape == (7, 4)  # without the padding
    assert [tensors[f"l{i}.1.up"].pieces[0].index for i in range(3)] == [(0, 1), (0, 1), (1, 1)]
    assert [tensors[f"l{i}.1.up"].pieces[0].path[1] for i in range(3)] == [0, 1, 0]


def test_a_number_that_was_held_in_32_bits_is_the_same():
    single = {"norm": {"kind": "rmsnorm", "eps": 9.999999747378752e-06}}
    assert differences(single, {"norm": {"kind": "rmsnorm", "eps": 1e-5}}) == []
    assert differences(single, {"norm": {"kind": "rmsnorm", "eps": 1e-6}}) == [
        ("norm.eps", 9.999999747378752e-06, 1e-6)
    ]
