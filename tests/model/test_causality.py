"""No token's output depends on a later token: proved by gradients, and by changing later tokens, over all registries.

Gradients do not see through choices (who gets a slot), changed tokens do; both are asked.
"""

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
# The same tokens as one document and as three.
DOCUMENTS = np.stack([np.zeros(LENGTH, np.int32), zoo.DOCUMENTS[zoo.DISTINCT][0]])
# (A table of bigrams has no layers, and sees one token alone.)
EVALUATED = {name: config for name, config in zoo.evaluated().items() if config.num_layers}
# The other parts have one form only.
TRAINED = {
    **{name: zoo.config_of(case) for name, case in zoo.CASES.items() if "moe-" in name},
    **{f"preset-{name}": validate(ModelConfig, zoo.shrunk(name)) for name in PRESETS if "moe" in name},
}


def dependence(model: Model, documents: np.ndarray | None, training: bool) -> np.ndarray:
    """Whether the output at t (rows) depends on the token at s (columns), for each row of documents. [B, T, T]

    Without documents there is one row, and the model is told of none.
    """
    params = zoo.lively(model)
    random = np.random.default_rng(5)
    rows = 1 if documents is None else len(documents)
    tokens = random.permutation(zoo.VOCAB)[:LENGTH]  # all different: each its own row of the embedding
    mixture = random.standard_normal((LENGTH, model.config.width)).astype(np.float32)

    def outputs(table, tokens):
        """[N, T] -> [N, B, T]"""
        decoder = model.module({**params, "embedding": table})
        each = jnp.repeat(tokens, rows, axis=0)
        segments = None if documents is None else jnp.tile(documents, (len(tokens), 1))
        hidden = decoder(each, training=training, segment_ids=segments).hidden
        return (hidden.astype(jnp.float32) * mixture).sum(-1).reshape(len(tokens), rows, LENGTH)

    def over(function):
        """`jax.vmap`; on a GPU a loop: JAX does not batch the gradient of `ragged_dot`, the product of experts."""
        return jax.vmap(function) if jax.default_backend() == "cpu" else lambda rows: jax.lax.map(function, rows)

    def both(table, changed):
        value, back = jax.vjp(lambda table: outputs(table, tokens[None])[0], table)
        each = jnp.eye(value.size).reshape(rows, LENGTH, *value.shape)
        gradients = over(over(lambda cotangent: back(cotangent)[0]))(each)
        return value, gradients, outputs(table, changed) if chooses else value

    # Row s: from position s on, other tokens. Only experts are chosen.
    chooses = any(layer.feedforward.kind == "moe" for layer in model.config.layers)
    later = np.triu(np.ones((LENGTH, LENGTH), bool))
    changed = np.where(later, random.integers(0, zoo.VOCAB, (LENGTH, LENGTH)), tokens)
    value, gradients, moved = jax.jit(both)(params["embedding"], changed)
    found = np.abs(gradients).sum(-1)[:, :, tokens] > 1e-5 * np.abs(gradients).max()
    if chooses:  # output t may not have moved where only tokens from s > t on were changed
        moves = np.abs(moved - value).transpose(1, 2, 0)
        found |= np.triu(moves > 1e-4 * np.abs(value).max(), 1)
    return found


def assert_causal(found: np.ndarray, documents: np.ndarray) -> None:
    assert not np.triu(found, 1).any(), f"depends on the future: {np.argwhere(np.triu(found, 1))[:5].tolist()}"
    assert found.diagonal(axis1=1, axis2=2).all(), "a token's output must depend on the token"
    other = documents[:, :, None] != documents[:, None, :]
    assert not (found & other).any(), "a document saw another"


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_is_causal_and_keeps_documents_apart(name):
    assert_causal(dependence(Model(EVALUATED[name]), DOCUMENTS, training=False), DOCUMENTS)


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_causal_where_and_only_where_the_parts_say_so(name):
    model = Model(TRAINED[name])
    parts = [part for layer in model.config.layers for part in (layer.attention, layer.feedforward)]
    if all(part.causal_in_training(model.config) for part in parts):
        assert model.training_caveat is None
        assert_causal(dependence(model, DOCUMENTS, training=True), DOCUMENTS)
    else:
        assert "training" in model.training_caveat


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
    tokens, documents = jnp.zeros(DOCUMENTS.shape, jnp.int32), jnp.asarray(DOCUMENTS)
    with pytest.raises(RequestError, match="causal_soft_moe"):
        jax.eval_shape(lambda p: model.hidden(p, tokens, segment_ids=documents, training=True), zoo.lively(model))
