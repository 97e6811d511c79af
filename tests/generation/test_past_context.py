"""Past the context: a window slides over the sequence, and up to there nothing changes."""

import jax.numpy as jnp
import numpy as np
import pytest

from polygpt import build, preset
from polygpt.errors import RequestError
from polygpt.generation import windowed

CONTEXT = 16
SHAPE = {"vocab_size": 40, "context_length": CONTEXT, "embed_dim": 16, "num_layers": 2, "init_std": 0.3}


def model(**changes):
    return build(preset("smollm", **SHAPE, attention={"num_heads": 2, "num_kv_heads": 1}, **changes), seed=1)


def test_the_first_tokens_are_the_models_own_and_the_rest_follow():
    lm = model()
    whole = lm.generate([1, 2, 3], max_new_tokens=40, temperature=0)
    longer = lm.generate([1, 2, 3], max_new_tokens=40, temperature=0, past_context=True)
    assert (whole.finish_reason, len(whole.tokens)) == ("context_length", CONTEXT - 3)
    assert (longer.finish_reason, len(longer.tokens)) == ("length", 40)
    assert longer.tokens[: CONTEXT - 4] == whole.tokens[:-1]


def test_each_token_is_the_likeliest_within_the_window():
    lm = model()
    ids = [1, 2, 3, *lm.generate([1, 2, 3], max_new_tokens=30, temperature=0, past_context=True).tokens]
    masked = windowed(lm.config)
    wide = masked.config.replace(context_length=64)
    logits = type(masked)(wide).logits(lm.params, jnp.array([ids]))
    assert np.asarray(logits)[0, 2:-1].argmax(-1).tolist() == ids[3:]


def test_a_model_that_cannot_is_refused():
    learned = build(preset("gpt2", **SHAPE, attention={"num_heads": 2}), seed=1)
    with pytest.raises(RequestError, match="position learned has no positions past context_length=16"):
        learned.generate([1], max_new_tokens=3, past_context=True)
