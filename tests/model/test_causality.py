"""No token's output depends on a later token: proved by gradients, and by changing later tokens, over all menus.

Gradients do not see through choices (who gets a slot), changed tokens do; both are asked.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.model import Model, ModelConfig
from polygpt.presets import PRESETS

LENGTH = zoo.LENGTH
DOCUMENTS = zoo.DOCUMENTS[zoo.DISTINCT][:1]
# What mixes tokens, or could by mistake; activations, norms and scalings of RoPE do not.
CASES = {
    name: case.changes
    for name, case in zoo.CASES.items()
    if not name.startswith(("mlp-", "glu-", "norm-", "scaling-", "documents", "embedding-"))
}


def dependence(model: Model, documents: np.ndarray | None, training: bool) -> np.ndarray:
    """Whether the output at t (rows) depends on the token at s (columns): by gradients or by changing it. [T, T]"""
    params = zoo.lively(model)
    graph = model.module(params)
    random = np.random.default_rng(5)
    tokens = random.permutation(zoo.VOCAB)[None, :LENGTH]  # all different: each its own row of the embedding
    mixture = random.standard_normal((LENGTH, graph.config.width)).astype(np.float32)

    def outputs(table, tokens):
        decoder = model.module({**params, "embedding": table})
        segments = None if documents is None else jnp.broadcast_to(documents, tokens.shape)
        hidden = decoder(tokens, training=training, segment_ids=segments).hidden
        return (hidden.astype(jnp.float32) * mixture).sum(-1)

    def both(table, tokens, changed):
        value, back = jax.vjp(lambda table: outputs(table, tokens)[0], table)
        gradients = jax.vmap(lambda row: back(row)[0])(jnp.eye(LENGTH))
        return value, gradients, outputs(table, changed)

    # Row s: from position s on, other tokens.
    later = np.triu(np.ones((LENGTH, LENGTH), bool))
    changed = np.where(later, random.integers(0, zoo.VOCAB, (LENGTH, LENGTH)), tokens)
    compiled = jax.jit(both, compiler_options=zoo.compiler_options())
    value, gradients, moved = compiled(params["embedding"], tokens, changed)
    by_gradient = np.abs(gradients).sum(-1)[:, tokens[0]] > 1e-5 * np.abs(gradients).max()
    # Output t may not have moved where only tokens from s > t on were changed.
    moves = np.abs(moved - value[None]).T
    return by_gradient | np.triu(moves > 1e-4 * np.abs(value).max(), 1)


def assert_causal(found: np.ndarray, documents: np.ndarray | None) -> None:
    assert not np.triu(found, 1).any(), f"depends on the future: {np.argwhere(np.triu(found, 1))[:5].tolist()}"
    assert found.diagonal().all(), "a token's output must depend on the token"
    if documents is not None:
        other = documents[0][:, None] != documents[0][None, :]
        assert not (found & other).any(), "a document saw another"


@functools.cache  # some presets are the same model once they are small
def assert_declared(config: ModelConfig) -> None:
    """Evaluation is causal; training is where, and only where, the parts say so.

    Of evaluation without documents test_decoding proves it for every one of these models: the full pass gives what
    decoding gives, which has seen no later token.
    """
    model = Model(config)
    assert_causal(dependence(model, DOCUMENTS, training=False), DOCUMENTS)
    parts = [part for layer in config.layers for part in (layer.attention, layer.feedforward)]
    if all(part.causal_in_training(config) for part in parts):
        assert model.training_caveat is None
        if any(part.kind in ("moe", "causal_soft_moe") for part in parts):  # the others have one form only
            assert_causal(dependence(model, None, training=True), None)
            assert_causal(dependence(model, DOCUMENTS, training=True), DOCUMENTS)
    else:
        assert "training" in model.training_caveat


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_causal_where_it_says_so(name):
    assert_declared(zoo.config_of(zoo.Case(CASES[name])))


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "bigram"])
def test_every_preset_is_causal_where_it_says_so(name):
    assert_declared(validate(ModelConfig, zoo.shrunk(name)))


@pytest.mark.parametrize("name", ["moe-claims-by-choice", "moe-claims-by-weight", "soft-moe-in-training"])
def test_training_forms_that_are_said_not_to_be_causal_are_not(name):
    """Else the tests above could not see a dependence through capacity, order or slots."""
    changes = zoo.CASES[name].changes
    if changes["feedforward"]["kind"] == "moe":
        changes = {"feedforward": {**changes["feedforward"], "capacity_factor": 0.5}}
    model = Model(zoo.config_of(zoo.Case(changes)))
    assert np.triu(dependence(model, None, training=True), 1).any()
    assert model.training_caveat is not None


def test_soft_moe_refuses_packed_documents_in_training():
    model = Model(zoo.config_of(zoo.CASES["feedforward-soft_moe"]))
    tokens, documents = jnp.zeros((1, LENGTH), jnp.int32), jnp.asarray(DOCUMENTS)
    with pytest.raises(RequestError, match="causal_soft_moe"):
        jax.eval_shape(lambda p: model.hidden(p, tokens, segment_ids=documents, training=True), zoo.lively(model))
