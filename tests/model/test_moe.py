"""Mixtures of experts: what the comparison with the specification does not reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xla
import zoo

from polygpt.model import Model
from polygpt.model.feedforward import moe

MANY = {"kind": "moe", "mlp_dim": 4, "num_experts": 16, "top_k": 1}


def test_a_short_sequence_finds_a_slot_where_many_experts_share_few():
    model = Model(zoo.config_of(zoo.Case({"feedforward": MANY})))
    tokens = jnp.zeros((2, 4), jnp.int32)
    loss, effects = jax.jit(model.loss)(zoo.lively(model), tokens, tokens, jnp.ones((2, 4)))
    assert np.isfinite(loss)
    assert float(effects.metrics["dropped_share"]) == pytest.approx(0.75)  # equal tokens, one slot a sequence


@pytest.mark.parametrize("num_experts", [3, 40])
def test_ranks_count_the_earlier_pairs_of_the_same_expert(num_experts):
    assert 3 < moe.SORTED_FROM < 40
    experts = np.random.default_rng(0).integers(0, num_experts, (2, 100))
    found = moe._rank(jnp.asarray(experts), num_experts)
    expected = [[(row[:i] == e).sum() for i, e in enumerate(row)] for row in experts]
    np.testing.assert_array_equal(found, expected)


def test_the_balance_bias_moves_towards_the_unused_and_stays_float32():
    model = Model(zoo.config_of(zoo.Case({"param_dtype": "bfloat16", "feedforward": {**MANY, "balance_rate": 1e-4}})))
    params = jax.tree.map(lambda info: jnp.full(info.shape, 0.1, info.dtype), model.parameters)
    params["blocks"][0]["feedforward"]["balance"] = jnp.full((1, 16), 0.5)
    tokens = jnp.zeros((2, 4), jnp.int32)
    _, effects = jax.jit(model.loss)(params, tokens, tokens, jnp.ones((2, 4)))
    bias = model.with_updates(params, effects.loads)["blocks"][0]["feedforward"]["balance"]
    assert bias.dtype == jnp.float32
    # All tokens are alike, so one expert has them all and fifteen have none.
    assert sorted(np.round((np.asarray(bias[0]) - 0.5) / 1e-4)) == [-1] + [1] * 15


def test_noise_is_of_training_alone_and_by_key():
    model = Model(zoo.config_of(zoo.Case({"feedforward": {**MANY, "num_experts": 4, "router_noise": 0.5}})))
    params, tokens = zoo.lively(model), jnp.asarray(np.random.default_rng(0).integers(0, zoo.VOCAB, (2, 24)))

    def hidden(training, key):
        return model.hidden(params, tokens, training=training, key=key).hidden

    compiled = jax.jit(hidden, static_argnums=0)
    first, again, other = (compiled(True, jax.random.key(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert (compiled(False, None) == compiled(False, jax.random.key(1))).all()


def test_one_row_reads_the_weights_of_its_experts_alone():
    model = Model(
        zoo.config_of(zoo.Case({"feedforward": {**MANY, "num_experts": 64, "mlp_dim": 32, "dispatch": "dropless"}}))
    )
    shapes = jax.tree.map(lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype), model.parameters)
    state = jax.eval_shape(lambda: model.init_state(1, 8))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def decode(params, token, state):
        return model.hidden(params, token, positions=jnp.zeros((1, 1), jnp.int32), state=state).hidden

    compiled = jax.jit(decode).lower(shapes, token, state).compile(compiler_options=xla.OPTIMIZED)
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 16 * 32 * 4  # one matrix of all experts
