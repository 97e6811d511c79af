"""Packed documents: a document's logits and loss are the same alone and in a packed row."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from polygpt.model import Model

# What may see documents apart, in evaluation and in training; experts with a capacity share it among a row's documents.
ATTENTIONS = {
    "softmax": {},
    "window": {"attention": {"window": 4}},
    "sinks": {"attention": {"sinks": True, "softcap": 2.0}},
    "local": {"attention": zoo.LOCAL},
    "linear": {"attention": {**zoo.LINEAR, "chunk": 5}},
    "linear-decay": {"attention": {**zoo.LINEAR, "decay": True}},
    "learned-positions": {"position": "learned"},
    "sinusoidal": {"position": "sinusoidal"},
    "alibi": {"position": "alibi"},
    "dropless-experts": {"feedforward": {**zoo.MOE, "dispatch": "dropless"}},
}
LENGTHS = (7, 1, 11, 5)
SEGMENTS = jnp.asarray(np.repeat([3, 0, 3, 9], LENGTHS)[None])


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_document_is_the_same_alone_and_packed(name):
    model = Model(zoo.config_of(zoo.Case({"num_layers": 2, **ATTENTIONS[name]})))
    params = zoo.lively(model)
    random = np.random.default_rng(0)
    tokens, targets = (jnp.asarray(random.integers(0, zoo.VOCAB, (1, sum(LENGTHS)))) for _ in range(2))
    ends = np.cumsum((0, *LENGTHS))

    def logits(tokens, segment_ids):
        hidden = model.hidden(params, tokens, segment_ids=segment_ids).hidden
        return model.module(params).logits(hidden)

    def loss(tokens, targets, segment_ids, weights):
        return model.loss(params, tokens, targets, weights, segment_ids=segment_ids)[0]

    packed = jax.jit(logits)(tokens, SEGMENTS)
    packed_loss = jax.jit(loss)
    # Documents alone are padded at the end, where nothing of them sees the padding: one shape is compiled.
    for start, stop in itertools.pairwise(ends):
        alone = [jnp.pad(x[:, start:stop], ((0, 0), (0, tokens.size - (stop - start)))) for x in (tokens, targets)]
        own = jnp.asarray((np.arange(tokens.size) >= stop - start)[None].astype(np.int32))
        found = jax.jit(logits)(alone[0], own)[:, : stop - start]
        np.testing.assert_allclose(found, packed[:, start:stop], rtol=1e-5, atol=1e-5)
        within = jnp.asarray(((np.arange(tokens.size) >= start) & (np.arange(tokens.size) < stop))[None], jnp.float32)
        whole = packed_loss(tokens, targets, SEGMENTS, within)
        by_itself = packed_loss(*alone, own, 1.0 - own)
        assert float(whole) == pytest.approx(float(by_itself), rel=1e-5)
