"""Training on a mesh: the losses of one device, each device's share of the bytes, and nothing sent but what must be."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("eight_devices.py")
CASES = [
    "dense:fsdp=8,accumulation_steps=2,ema_decay=0.9",
    "dense:data=2,fsdp=2,tensor=2",
    "grouped:tensor=8,remat=block",
    "odd:tensor=3",
    "linear:data=2,fsdp=2,tensor=2",
    "capacity:data=2,expert=4,accumulation_steps=2",
    "dropless:data=2,expert=4",
]
AXES = [*(f"{axis}={count}" for axis in ("data", "fsdp", "tensor", "expert") for count in (2, 8))]
SLOW_CASES = [
    f"{model}:{mesh}"
    for model in ("dense", "grouped", "linear", "capacity", "dropless", "soft", "causal_soft")
    for mesh in (*AXES, "data=2,fsdp=2,tensor=2", "data=2,expert=4")
    if f"{model}:{mesh}" not in CASES
]
HIDDEN = {"16,12,32", "8,12,32", "192,32", "96,32"}  # the shapes of whole activations, for the batch and for half of it

ROUTER = {"f32[32,8]", "f32[1,32,8]", "f32[8]", "f32[1,8]"}  # its weights and the balance of the experts


def run(cases):
    command = [sys.executable, str(PROGRAM), *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def measured():
    return run(CASES)


def same_losses(found):
    worst = max(abs(own / alone - 1) for own, alone in zip(found["losses"], found["alone"], strict=True))
    assert len(found["losses"]) == 20
    assert found["alone"][-1] < found["alone"][0]
    assert worst < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_one_device(measured, case):
    same_losses(measured[case])


@pytest.mark.parametrize("case", CASES)
def test_no_activations_are_gathered(measured, case):
    """Weights are gathered over fsdp, a router and the tokens of dropless experts over expert; nothing else."""
    for kind, axes, shape, source in measured[case]["sent"]:
        if kind != "all-gather":
            continue
        if axes == ["expert"]:
            assert shape in ROUTER or (case.startswith("dropless") and source.endswith("all_gather")), (shape, source)
            continue
        assert "fsdp" in axes, (kind, axes, shape, source)
        assert "sharding_constraint" in source, (kind, axes, shape, source)
        assert not any(f"[{own}]" in shape for own in HIDDEN), (kind, axes, shape, source)


def test_each_device_holds_its_share(measured):
    found = measured["dense:fsdp=8,accumulation_steps=2,ema_decay=0.9"]
    for own, whole in (("params", "whole_params"), ("optimizer", "whole_optimizer"), ("average", "whole_params")):
        assert len(found[own]) == 8
        assert max(found[own]) / (found[whole] / 8) < 1.06, own  # biases of hidden units stay whole


def test_bytes_follow_all_axes_of_a_mesh(measured):
    found = measured["dense:data=2,fsdp=2,tensor=2"]
    ideal = found["whole_params"] / 4  # data replicates
    assert max(found["params"]) / ideal < 1.15  # gains are split over fsdp alone
    assert max(found["optimizer"]) / (found["whole_optimizer"] / 4) < 1.15


def test_experts_are_spread_and_rows_sent_to_them(measured):
    found = measured["capacity:data=2,expert=4,accumulation_steps=2"]
    kinds = {(kind, tuple(axes)) for kind, axes, *_ in found["sent"]}
    assert ("all-to-all", ("expert",)) in kinds
    assert max(found["params"]) < 0.75 * found["whole_params"]


def test_only_rows_and_their_gradients_cross_the_tensor_axis(measured):
    """Every product is computed where its part of the weight is; sums of rows are the only thing that is sent."""
    kinds = {kind for kind, axes, *_ in measured["grouped:tensor=8,remat=block"]["sent"]}
    assert kinds == {"all-reduce"}


@pytest.mark.slow
def test_every_model_on_every_axis():
    for case, found in run(SLOW_CASES).items():
        try:
            same_losses(found)
        except AssertionError as error:
            raise AssertionError(case) from error


@pytest.mark.parametrize("kind", ["muon", "adafactor", "lion", "schedule_free", "sgd"])
def test_optimizer_states_are_placed_like_their_parameters(kind):
    import jax
    from jax.sharding import AbstractMesh

    from polygpt.config import validate
    from polygpt.model import Model
    from polygpt.presets import preset
    from polygpt.sharding import MESH_AXES, Scope
    from polygpt.training import Trainer, TrainingConfig

    model = Model(
        preset("gpt", vocab_size=256, embed_dim=128, attention={"num_heads": 8}, feedforward={"mlp_dim": 256})
    )
    optimizer = {"kind": kind, "min_dim_to_factor": 16} if kind == "adafactor" else {"kind": kind}
    config = validate(TrainingConfig, {"steps": 2, "batch_size": 8, "optimizer": optimizer})
    trainer = Trainer(model, config, Scope(AbstractMesh((1, 4, 2, 1), MESH_AXES)))
    shapes = jax.tree.map(lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype), model.parameters)
    state = jax.eval_shape(trainer.optimizer.init, shapes)
    whole = own = 0
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(trainer.state_shardings.optimizer), strict=True):
        whole += leaf.size
        own += math.prod(sharding.shard_shape(leaf.shape))
    # Means over rows and columns are split over one of the two axes.
    assert own < whole * (0.55 if kind == "adafactor" else 0.15)
