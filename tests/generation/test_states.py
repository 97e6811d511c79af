"""Every kind of decoding state: cut into blocks, put together again, and moved between rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from polygpt.generation import states
from polygpt.model import Model

STATES = zoo.evaluated()
QUICK = ("attention-", "feedforward-")
EVERY = [pytest.param(name, marks=() if name.startswith(QUICK) else pytest.mark.slow) for name in STATES]


@pytest.mark.parametrize("name", EVERY)
def test_every_state_survives_reading_in_chunks_insert_take_and_put(name):
    """A prompt read in chunks, taken out and put into another row, then decoded in slot 1 of 2: as a full pass."""
    model = Model(STATES[name])
    params, length = zoo.lively(model), zoo.LENGTH
    tokens = jnp.asarray(np.random.default_rng(7).integers(0, zoo.VOCAB, (1, 11)))

    @jax.jit
    def run(params, tokens):
        row = model.init_state(1, length)
        row = model.hidden(params, tokens[:, :5], positions=jnp.arange(5)[None], state=row).state
        block = states.take_block(row, 0, 5, length)
        other = states.put_block(model.init_state(1, length), block, 0, length)
        positions = 5 + jnp.arange(5)[None]
        other = model.hidden(params, tokens[:, 5:10], positions=positions, state=other).state
        state = states.insert(model.init_state(2, length), other, 1, 10, 4, length)
        both = jnp.stack([jnp.zeros(1, jnp.int32), tokens[0, 10:]])
        hidden = model.hidden(params, both, positions=jnp.array([[0], [10]]), state=state).hidden
        restarted = states.restart(other, model.init_state(1, length), length)
        again = model.hidden(params, tokens[:, :5], positions=jnp.arange(5)[None], state=restarted).hidden
        decoder = model.module(params)
        return decoder.logits(hidden)[1, 0], decoder.logits(again)[0, 4], model.logits(params, tokens)[0]

    decoded, again, full = run(params, tokens)
    tolerance = 1e-4 * np.abs(full).max()
    np.testing.assert_allclose(decoded, full[10], rtol=0, atol=tolerance)
    np.testing.assert_allclose(again, full[4], rtol=0, atol=tolerance)
