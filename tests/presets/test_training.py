"""Every preset, with its sizes made small and nothing else changed, learns in 30 steps of real text."""

from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax import lax

from polygpt.config import validate
from polygpt.data.builtin import topics
from polygpt.model import Model, ModelConfig
from polygpt.presets import PRESETS, preset_fields
from polygpt.training import Batch, Trainer, TrainingConfig

BYTES, LENGTH, BATCH, STEPS = 256, 32, 4, 30


@pytest.fixture(scope="module")
def batches():
    """A batch of windows for each step, of the interpreter's own documentation, as bytes."""
    text = np.frombuffer(b"".join(text for _, text in islice(topics(), 40)), np.uint8)
    starts = np.random.default_rng(0).integers(0, len(text) - LENGTH - 1, (STEPS, BATCH))
    windows = text[starts[..., None] + np.arange(LENGTH + 1)].astype(np.int32)
    return Batch(jnp.asarray(windows[..., :-1]), jnp.asarray(windows[..., 1:]), jnp.ones((STEPS, BATCH, LENGTH)))


def small(name: str) -> ModelConfig:
    fields = preset_fields(name)
    own = {key: fields[key] for key in ("compute_dtype", "param_dtype", "dropout", "init") if key in fields}
    sizes = {"vocab_size": BYTES, "context_length": LENGTH, "mlp_dim": 64, "slots_per_expert": 8}
    return validate(ModelConfig, zoo.shrunk(name, **sizes, **own))


SMALL = zoo.each_once({name: small(name) for name in PRESETS})


@pytest.mark.parametrize("name", SMALL)
def test_a_preset_learns(name, batches):
    config = SMALL[name]
    rate = 0.1 if name == "bigram" else 0.02  # a table of logits has far to go
    settings = {"steps": STEPS, "batch_size": BATCH, "schedule": "constant", "optimizer": {"learning_rate": rate}}
    trainer = Trainer(Model(config), validate(TrainingConfig, settings))
    _, metrics = jax.jit(lambda: lax.scan(trainer.step, trainer.init(), batches))()
    losses = np.asarray(metrics.loss)
    assert losses[0] == pytest.approx(np.log(BYTES), rel=0.3)  # untrained: all bytes alike
    assert np.mean(losses[-5:]) < 0.8 * losses[0], losses
    moe = name in ("tiny_moe", "tiny_moe_2")
    assert set(metrics.extra) == ({"load_balance", "z_loss", "expert_load_max", "dropped_share"} if moe else set())
