"""One step: the loss it descends, clipping, masks, and nothing that depends on anything but its inputs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.config import validate
from polygpt.model import Model, ModelConfig
from polygpt.training import Batch, Trainer, TrainingConfig, TrainState
from polygpt.training.step import nll_sums

FIELDS = {
    "vocab_size": 13,
    "context_length": 8,
    "embed_dim": 8,
    "num_layers": 1,
    "position": "rope",
    "norm": "rmsnorm",
    "attention": {"kind": "softmax", "num_heads": 2},
    "feedforward": {"kind": "glu", "mlp_dim": 8},
    "dropout": 0.1,
}


@pytest.fixture(scope="module")
def model():
    return Model(validate(ModelConfig, FIELDS))


def trainer_of(model, **changes):
    fields = {"steps": 50, "batch_size": 3, "optimizer": {"kind": "adamw", "learning_rate": 0.01}, **changes}
    return Trainer(model, validate(TrainingConfig, fields))


@pytest.fixture(scope="module")
def trainer(model):
    return trainer_of(model)


@pytest.fixture(scope="module")
def state(trainer):
    return trainer.init()


@pytest.fixture(scope="module")
def step(trainer):
    return jax.jit(trainer.step)


def batch_of(seed, masked=0):
    tokens = np.random.default_rng(seed).integers(0, 13, (3, 9)).astype(np.int32)
    mask = np.ones((3, 8), np.float32)
    mask[:, :masked] = 0
    return Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]), jnp.asarray(mask))


def test_the_first_loss_is_that_of_guessing(step, state):
    _, metrics = step(state, batch_of(0))
    assert float(metrics.loss) == pytest.approx(np.log(13), abs=0.1)


def test_steps_on_one_batch_descend(step, state):
    losses = []
    for _ in range(40):
        state, metrics = step(state, batch_of(0))
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.8
    assert int(state.step) == 40


def test_the_same_step_twice_is_the_same_to_the_bit(step, state):
    first, second = (step(state, batch_of(1)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_dropout_differs_from_step_to_step(step, state):
    later = TrainState(state.params, state.optimizer, state.step + 1)
    assert float(step(state, batch_of(1))[1].loss) != float(step(later, batch_of(1))[1].loss)


def test_masked_targets_do_not_count(model, state):
    whole, masked = batch_of(2), batch_of(2, masked=5)
    other = masked._replace(target=masked.target.at[:, :5].set(0))
    sums = jax.jit(lambda batch: nll_sums(model, state.params, batch))
    np.testing.assert_array_equal(sums(masked), sums(other))
    assert float(sums(masked)[1]) == 9
    assert float(sums(whole)[1]) == 24


def test_the_training_loss_is_the_mean_over_what_counts(model, step, state):
    batch = batch_of(4, masked=3)
    plain = Model(model.config.replace(dropout=0.0))
    _, metrics = jax.jit(trainer_of(plain).step)(state, batch)
    nats, tokens = jax.jit(partial(nll_sums, plain))(state.params, batch)
    assert float(metrics.loss) == pytest.approx(float(nats / tokens), rel=1e-5)
    _, empty = step(state, batch._replace(mask=jnp.zeros((3, 8))))
    assert float(empty.loss) == 0


def test_clipping_bounds_the_global_norm(model, state):
    """With plain descent in place of AdamW a step's length shows the clipped norm."""
    import optax

    trainer = trainer_of(model, clip_norm=0.01)
    trainer.optimizer = optax.sgd(1.0)
    start = TrainState(state.params, trainer.optimizer.init(state.params), state.step)
    after, metrics = jax.jit(trainer.step)(start, batch_of(3))
    length = optax.tree.norm(jax.tree.map(jnp.subtract, after.params, start.params))
    assert float(metrics.grad_norm) > 0.01, "the metric is the norm before clipping"
    assert float(length) == pytest.approx(0.01, rel=1e-3)


def test_the_compiled_step_takes_the_old_states_memory(trainer):
    state = trainer.init()
    function = trainer.compile_step(state, batch_of(0))
    function(state, batch_of(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
