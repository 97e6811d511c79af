"""A model laid out layer by layer computes and decodes what the stacked one does."""

import jax
import numpy as np
import pytest
import zoo

import polygpt
from polygpt.config import validate
from polygpt.generation import Sampler, generate_tokens
from polygpt.loading import load, save
from polygpt.model import Model, ModelConfig

PATTERN = {
    **zoo.BASE,
    "num_layers": 5,
    "pattern": [{"feedforward": zoo.MOE}, {"attention": {"window": 5}}],
}


@pytest.mark.parametrize("fields", [PATTERN, {**zoo.BASE, "num_layers": 3}], ids=["pattern", "plain"])
def test_the_same_logits_and_the_same_text(fields, tmp_path):
    config = validate(ModelConfig, fields)
    save(polygpt.build(config), tmp_path / "model")
    stacked, unrolled = (load(tmp_path / "model", unrolled=flag) for flag in (False, True))
    assert unrolled.config == config
    assert len(unrolled.params["blocks"]) == config.num_layers
    assert unrolled.num_parameters == stacked.num_parameters
    tokens = np.random.default_rng(0).integers(0, zoo.VOCAB, (2, 10))
    np.testing.assert_allclose(unrolled.logits(tokens), stacked.logits(tokens), rtol=1e-5, atol=1e-6)

    def text(lm):
        chunks = generate_tokens(lm.model, lm.params, tokens.tolist(), Sampler(temperature=0), max_new_tokens=8)
        return [row for chunk in chunks for row in chunk]

    assert text(unrolled) == text(stacked)


def test_a_model_without_layers_is_as_it_was():
    config = polygpt.preset("bigram", vocab_size=11)
    assert jax.tree.structure(Model(config.unrolled).parameters) == jax.tree.structure(Model(config).parameters)
