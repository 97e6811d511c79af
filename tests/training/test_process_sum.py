"""Gradients of several processes on CPUs: one message, and the gradient of the whole batch."""

import json
import os
import subprocess
import sys

import pytest
from jax.sharding import AbstractMesh

from polygpt.model import Model
from polygpt.presets import preset
from polygpt.sharding import MESH_AXES, MeshConfig, Rules, Scope, use_mesh
from polygpt.training import process_sum

PROGRAM = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from polygpt.config import validate
from polygpt.model import Model, ModelConfig
from polygpt.sharding import MeshConfig, Scope
from polygpt.training import Batch, Trainer, TrainingConfig, process_sum

FIELDS = {
    "vocab_size": 40, "context_length": 8, "embed_dim": 16, "num_layers": 2, "position": "learned", "norm": "rmsnorm",
    "attention": {"kind": "softmax", "num_heads": 2}, "feedforward": {"kind": "mlp", "mlp_dim": 24},
}
random = np.random.default_rng(0)
tokens = random.integers(0, 40, (4, 9)).astype(np.int32)
mask = (random.random((4, 8)) < 0.7).astype(np.float32)
arrays = {"input": tokens[:, :-1], "target": tokens[:, 1:], "mask": mask}
training = validate(TrainingConfig, {"steps": 2, "batch_size": 4, "clip_norm": None, **json.loads(sys.argv[1])})
found = []
for mesh, processes in ((None, 1), (MeshConfig(data=2), 1), (MeshConfig(data=2), 2)):
    process_sum.process_count = lambda: processes
    scope = Scope.of(mesh)
    trainer = Trainer(Model(validate(ModelConfig, FIELDS | json.loads(sys.argv[2]))), training, scope)
    state, batch = trainer.init(), Batch.of(arrays, scope)
    step = trainer.compile_step(state, batch)
    sums = re.findall(r"= (.*) all-reduce(?:-start)?\\(", step.as_text())
    state, metrics = step(state, batch)
    norms = [float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(state.params)]
    found.append({"sums": sums, "loss": float(metrics.loss), "grad_norm": float(metrics.grad_norm), "norms": norms})
print(json.dumps(found))
"""


def measure(training, model):
    """One device, two devices of one process, and the two as if they were of two processes."""
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}
    words = [sys.executable, "-c", PROGRAM, json.dumps(training), json.dumps(model)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("training", [{}, {"accumulation_steps": 2, "remat": "block"}])
def test_one_message_holds_every_gradient_and_nothing_else_changes(training):
    alone, devices, processes = measure(training, {})
    arrays = [each.count("f32[") for each in devices["sums"]]
    assert sum(arrays) > 10
    # Apart from single numbers, such as how many tokens count.
    assert len([each for each in processes["sums"] if not each.startswith("f32[]")]) == 1
    for name in ("loss", "grad_norm"):
        assert processes[name] == pytest.approx(alone[name], rel=1e-5)
    assert processes["norms"] == pytest.approx(alone["norms"], rel=1e-5)


@pytest.mark.parametrize(
    "model",
    [{"dropout": 0.5}, {"feedforward": {"kind": "moe", "mlp_dim": 8, "num_experts": 2, "top_k": 1}}],
    ids=["dropout", "experts"],
)
def test_what_belongs_to_the_whole_batch_is_left_to_the_partitioner(model):
    _, devices, processes = measure({}, model)
    assert processes == devices


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        (MeshConfig(data=2), True),
        (MeshConfig(fsdp=2), False),
        (MeshConfig(data=2, rules={"embed": ("fsdp", "data")}), False),
    ],
    ids=["whole", "fsdp", "a rule"],
)
def test_parameters_that_are_split_are_not_gathered_for_it(monkeypatch, mesh, expected):
    monkeypatch.setattr(process_sum, "process_count", lambda: 2)
    scope = Scope(AbstractMesh(mesh.shape, MESH_AXES), Rules.of(mesh))
    with use_mesh(scope):
        model = Model(preset("gpt", num_layers=1, embed_dim=12, vocab_size=16))
        assert process_sum.sums_in_one_message(model, scope) is expected
