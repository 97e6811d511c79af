"""Accumulation over parts of a batch equals the batch in one; rematerialization changes no number."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.model import Model, ModelConfig
from polygpt.training import Batch, Trainer, TrainingConfig

FIELDS = {
    "vocab_size": 13,
    "context_length": 8,
    "embed_dim": 8,
    "num_layers": 2,
    "position": "rope",
    "norm": "rmsnorm",
    "attention": {"kind": "softmax", "num_heads": 2},
    "feedforward": {"kind": "glu", "mlp_dim": 8},
}
EXPERTS = {"kind": "moe", "num_experts": 4, "top_k": 2, "mlp_dim": 8, "load_balance_loss": 1.0, "balance_rate": 0.1}
MODELS = {
    "dense": {},
    "experts": {"feedforward": EXPERTS},
    "dropless": {"feedforward": {**EXPERTS, "dispatch": "dropless"}},
}


def trainer_of(changes=None, **training):
    fields = {"steps": 50, "batch_size": 8, "optimizer": {"kind": "adamw", "learning_rate": 0.01}, **training}
    return Trainer(Model(validate(ModelConfig, FIELDS | (changes or {}))), validate(TrainingConfig, fields))


def ragged(packed=False):
    """A batch whose rows count differently many tokens, the last two none."""
    tokens = np.random.default_rng(0).integers(0, 13, (8, 9)).astype(np.int32)
    mask = (np.arange(8) < np.asarray([8, 1, 5, 8, 2, 7, 0, 0])[:, None]).astype(np.float32)
    segments = jnp.asarray([[0] * 3 + [1] * 5] * 8) if packed else None
    return Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]), jnp.asarray(mask), segments)


def assert_equal(found, expected):
    """Each array to 1e-6 of its largest number."""

    def compare(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * max(np.abs(b).max(initial=0), 1e-3))

    jax.tree.map(compare, found, expected)


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("kind", MODELS)
def test_accumulation_equals_the_whole_batch(kind, count):
    whole, parts = trainer_of(MODELS[kind]), trainer_of(MODELS[kind], accumulation_steps=count)
    state, batch = whole.init(), ragged(packed=kind == "dense")
    expected, found = (jax.jit(trainer.gradients)(state, batch) for trainer in (whole, parts))
    assert_equal(found, expected)
    if kind != "dense":
        assert float(found[1].extra["load_balance"]) > 0
        after = jax.jit(parts.step)(state, batch)[0]
        assert np.abs(np.asarray(after.params["blocks"][0]["feedforward"]["balance"])).max() > 0


def test_accumulation_draws_other_dropout_for_each_part_and_repeats_it():
    trainer = trainer_of({"dropout": 0.5}, accumulation_steps=2)
    state, batch = trainer.init(), ragged()
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf[:4], leaf[:4]]), batch._replace(segment_ids=None))
    step = jax.jit(trainer.step)
    first, again = step(state, twice)[1], step(state, twice)[1]
    assert float(first.loss) == float(again.loss)
    one = jax.jit(trainer_of({"dropout": 0.5}, batch_size=4).step)(state, jax.tree.map(lambda leaf: leaf[:4], batch))[1]
    assert float(first.loss) != pytest.approx(float(one.loss), rel=1e-5)


def test_accumulation_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(RequestError, match=r"accumulation_steps=3 does not divide batch_size=8; these do: 1, 2, 4, 8$"):
        trainer_of(accumulation_steps=3)


@pytest.mark.parametrize("remat", ["dots", "block", "full"])
@pytest.mark.parametrize("scan", [True, False])
def test_rematerialization_changes_no_number(remat, scan):
    changes = {"num_layers": 5, "dropout": 0.1, "scan_layers": scan, "feedforward": EXPERTS}
    plain, again = trainer_of(changes), trainer_of(changes, remat=remat)
    state, batch = plain.init(), ragged()
    expected, found = (jax.jit(trainer.gradients)(state, batch) for trainer in (plain, again))
    assert_equal(found, expected)


def test_rematerialization_keeps_less():
    """What the gradient keeps from the forward pass, in numbers."""
    state, batch = trainer_of({"num_layers": 9}).init(), ragged()

    def kept(remat):
        trainer = trainer_of({"num_layers": 9}, remat=remat)
        loss = partial(
            trainer.model.loss, tokens=batch.input, targets=batch.target, token_weights=batch.mask, remat=remat
        )
        _, pullback = jax.eval_shape(lambda params: jax.vjp(lambda p: loss(p)[0], params), state.params)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    sizes = [kept(remat) for remat in ("none", "dots", "block", "full")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_rematerialization_takes_less_memory_whatever_the_number_of_layers():
    """In compiled steps: XLA would merge what is computed again with what was, were these layers unrolled."""
    batch = Batch(jnp.zeros((8, 128), jnp.int32), jnp.zeros((8, 128), jnp.int32), jnp.ones((8, 128)))

    def temporary(remat):
        trainer = trainer_of({"num_layers": 8, "context_length": 128}, remat=remat)
        compiled = trainer.lower_step(trainer.abstract_state(), batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary("block") < temporary("none") / 2


def test_the_logits_of_a_batch_are_never_whole_in_memory():
    """A vocabulary so large that the logits of all tokens would be most of the step's memory."""
    trainer = trainer_of({"vocab_size": 2**16, "context_length": 64})
    batch = Batch(jnp.zeros((8, 64), jnp.int32), jnp.zeros((8, 64), jnp.int32), jnp.ones((8, 64)))
    text = str(jax.make_jaxpr(trainer.step)(trainer.abstract_state(), batch))
    rows = 8 * 64
    assert f"[{rows},{2**16}]" not in text
    assert f"[8,64,{2**16}]" not in text
    assert f",{2**16}]" in text


@pytest.mark.parametrize("precision", ["default", "highest"])
def test_the_precision_of_products_is_set_for_the_loss_and_its_gradient(precision):
    trainer = trainer_of({"matmul_precision": precision})
    text = str(jax.make_jaxpr(trainer.gradients)(trainer.abstract_state(), ragged()))
    products = [line for line in text.splitlines() if "precision=" in line]
    wanted = "HIGHEST" if precision == "highest" else "DEFAULT"
    assert products
    assert all(wanted in line for line in products)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": {"kind": "local", "num_heads": 2, "window": 3}},
        {"attention": {"kind": "linear", "num_heads": 2}},
        {"position": "alibi"},
        {"feedforward": EXPERTS},
    ],
    ids=["softmax", "local", "linear", "alibi", "moe"],
)
def test_float16_has_the_gradients_of_float32(changes):
    """Loss scaling, accumulation and every kind of attention: masks do not overflow, small gradients do not vanish."""
    trainers = [
        trainer_of(changes | {"compute_dtype": dtype}, accumulation_steps=2) for dtype in ("float32", "float16")
    ]
    state, batch = trainers[1].init(), ragged()
    (expected, metrics, _), (found, half, _) = (
        jax.jit(trainer.gradients)(start, batch)
        for trainer, start in zip(trainers, (state._replace(loss_scale=None), state), strict=True)
    )
    assert float(half.loss) == pytest.approx(float(metrics.loss), rel=2e-3)
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, found, expected))
    assert float(difference) < 0.02 * float(optax.tree.norm(expected))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_the_loss_curves_of_three_precisions_agree():
    """Over 300 steps the losses of bfloat16 stay within 0.05 nats of float32's, those of float16 within 0.1.

    float16 skips steps whose gradients overflow, and is then a step behind: 0.07 nats at the most, where the loss falls
    fastest.
    """
    curves = {}
    for dtype in ("float32", "bfloat16", "float16"):
        trainer = trainer_of({"compute_dtype": dtype}, steps=300)
        state, step, losses = trainer.init(), jax.jit(trainer.step), []
        for _ in range(300):
            state, metrics = step(state, ragged())
            losses.append(float(metrics.loss))
        curves[dtype] = np.asarray(losses)
    assert curves["float32"][-1] < curves["float32"][0] - 1
    for dtype, band in (("bfloat16", 0.05), ("float16", 0.1)):
        np.testing.assert_allclose(curves[dtype], curves["float32"], atol=band)
