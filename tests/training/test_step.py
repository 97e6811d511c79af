"""One step: the loss it descends, clipping, masks, and nothing that depends on anything but its inputs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from polygpt.config import validate
from polygpt.model import NO_EFFECTS, Model, ModelConfig
from polygpt.training import Batch, Trainer, TrainingConfig
from polygpt.training.meter import Meter
from polygpt.training.state import Metrics
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
    later = state._replace(step=state.step + 1)
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


@pytest.mark.parametrize("clip_norm", [0.01, 100.0, None])
def test_clipping_bounds_the_global_norm_and_leaves_smaller_gradients(model, state, clip_norm):
    """With plain descent in place of AdamW a step's length shows the clipped norm."""
    trainer = trainer_of(model, clip_norm=clip_norm)
    trainer.optimizer = optax.sgd(1.0)
    start = state._replace(optimizer=trainer.optimizer.init(state.params))
    after, metrics = jax.jit(trainer.step)(start, batch_of(3))
    length = optax.tree.norm(jax.tree.map(jnp.subtract, after.params, start.params))
    assert 0.01 < float(metrics.grad_norm) < 100, "the metric is the norm before clipping"
    assert float(length) == pytest.approx(0.01 if clip_norm == 0.01 else float(metrics.grad_norm), rel=1e-3)


def test_a_step_is_its_gradients_applied(trainer, state):
    @jax.jit
    def in_two(state, batch):
        gradients, metrics, effects = trainer.gradients(state, batch)
        return trainer.apply(state, gradients, metrics, effects)

    whole, metrics = jax.jit(trainer.step)(state, batch_of(3))
    jax.tree.map(np.testing.assert_array_equal, in_two(state, batch_of(3)), (whole, metrics))


def test_gradients_of_two_batches_add_up_to_those_of_both(model, state):
    """What accumulation needs: nothing happens to the parameters before `apply`."""
    plain = trainer_of(Model(model.config.replace(dropout=0.0)))
    both = Batch(*(jnp.concatenate(pair) for pair in zip(batch_of(3)[:3], batch_of(4)[:3], strict=True)))
    one, two, sum_of_both = (jax.jit(plain.gradients)(state, batch)[0] for batch in (batch_of(3), batch_of(4), both))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one, two)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), mean, sum_of_both)


def test_packed_documents_have_the_loss_they_have_alone(model, state):
    plain = trainer_of(Model(model.config.replace(dropout=0.0)))
    gradients = jax.jit(plain.gradients)
    whole = batch_of(5)
    segments = jnp.asarray([[0] * 3 + [1] * 5] * 3)
    packed, metrics, _ = gradients(state, whole._replace(segment_ids=segments))
    parts = []
    for document in (slice(0, 3), slice(3, 8)):
        alone = Batch(
            *(jnp.pad(leaf[:, document], ((0, 0), (0, 8 - (document.stop - document.start)))) for leaf in whole[:3])
        )
        assert float(alone.mask.sum()) == 3 * (document.stop - document.start)
        parts.append((alone.mask.sum() / 24, gradients(state, alone)))
    assert float(metrics.loss) == pytest.approx(float(sum(share * part[1].loss for share, part in parts)), rel=1e-5)
    total = jax.tree.map(lambda a, b: parts[0][0] * a + parts[1][0] * b, parts[0][1][0], parts[1][1][0])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), packed, total)
    assert float(gradients(state, whole)[1].loss) != pytest.approx(float(metrics.loss), rel=1e-4)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_float16_parameters_are_updated_in_float32(model, kind):
    """Adam's eps is 0 in float16, and so are the squares of most gradients."""
    losses = {}
    for dtype in ("float32", "float16"):
        typed = Model(model.config.replace(param_dtype=dtype, compute_dtype=dtype, dropout=0.0))
        trainer = trainer_of(typed, optimizer={"kind": kind, "learning_rate": 0.01})
        state, step = trainer.init(), jax.jit(trainer.step)
        losses[dtype] = []
        for _ in range(20):
            state, metrics = step(state, batch_of(0))
            losses[dtype].append(float(metrics.loss))
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state.params))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float16")}
    floating = [leaf for leaf in jax.tree.leaves(state.optimizer) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floating} == {jnp.dtype("float32")}
    np.testing.assert_allclose(losses["float16"], losses["float32"], atol=0.02)


def test_the_norm_of_float16_gradients_does_not_overflow(model):
    half = Model(model.config.replace(param_dtype="float16"))
    trainer = trainer_of(half)
    state = trainer.init()
    large = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 300, leaf.dtype), state.params)
    large = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), large)  # as `gradients` returns them
    after, metrics = jax.jit(trainer.apply)(state, large, Metrics(jnp.float32(1), {}), NO_EFFECTS)
    assert float(metrics.grad_norm) == pytest.approx(300 * half.num_parameters**0.5, rel=1e-3)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(after.params))


def test_the_compiled_step_takes_the_old_states_memory(trainer):
    state = trainer.init()
    function = trainer.compile_step(state, batch_of(0))
    function(state, batch_of(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_updates_without_gradients_are_computed_once_from_the_mean_load(model):
    experts = {
        "kind": "moe",
        "num_experts": 4,
        "top_k": 1,
        "mlp_dim": 8,
        "balance_rate": 0.25,
        "load_balance_loss": 0.0,
    }
    trainer = trainer_of(Model(validate(ModelConfig, FIELDS | {"feedforward": experts, "dropout": 0.0})))
    state = trainer.init()
    gradients, metrics, one = jax.jit(trainer.gradients)(state, batch_of(0))
    _, _, two = jax.jit(trainer.gradients)(state, batch_of(1))
    loads = jax.tree.map(lambda a, b: (a + b) / 2, one.loads, two.loads)
    after, *_ = jax.jit(trainer.apply)(state, gradients, metrics, one._replace(loads=loads))
    (mean,) = (np.asarray(leaf).reshape(-1, 4) for leaf in jax.tree.leaves(loads))
    balance = after.params["blocks"][0]["feedforward"]["balance"]
    np.testing.assert_allclose(balance, 0.25 * np.sign(0.25 - mean))
    assert np.abs(mean - 0.25).max() > 0.01


def test_the_experts_loads_are_reported_by_layer_once_a_group():
    experts = {"kind": "moe", "num_experts": 4, "top_k": 1, "mlp_dim": 8}
    fields = FIELDS | {"num_layers": 3, "dropout": 0.0, "pattern": [{"feedforward": experts}, {}]}
    trainer, events = trainer_of(Model(validate(ModelConfig, fields))), []
    state, meter = trainer.init(), Meter(events.append, 1)
    _, _, effects = jax.jit(trainer.gradients)(state, batch_of(0))
    step = jax.jit(trainer.step)
    for number in (1, 2):
        _, metrics = step(state, batch_of(0))
        meter.add(number, metrics)
    meter.flush()
    first, second = events
    assert first.expert_load is None
    assert list(second.expert_load) == [0, 2]
    np.testing.assert_allclose(list(second.expert_load.values()), effects.loads[0]["load"], atol=1e-4)
    assert len({tuple(load) for load in second.expert_load.values()}) == 2, "the layers differ"


def test_a_model_without_experts_reports_no_loads(model):
    trainer = trainer_of(model)
    assert jax.eval_shape(trainer.step, trainer.abstract_state(), batch_of(0))[1].expert_load == {}
