"""Trains tiny models on eight simulated devices and on one: a program of its own, since JAX counts devices at start.

`python eight_devices.py CASE...` prints, as JSON, what each case gives (see `measure`). A case is a model and a mesh
with settings of training, such as `dense:fsdp=8,accumulation_steps=2`.
"""

import json
import os
import sys
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import numpy as np

from polygpt.config import merge, validate
from polygpt.model import Model, ModelConfig
from polygpt.sharding import MESH_AXES, MeshConfig, Scope, collectives
from polygpt.training.config import TrainingConfig
from polygpt.training.state import Batch, TrainState
from polygpt.training.step import Trainer

STEPS, ROWS, LENGTH, VOCAB = 20, 16, 12, 48
DENSE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "context_length": LENGTH,
    "embed_dim": 32,
    "num_layers": 2,
    "scan_layers": True,
    "position": {"kind": "rope"},
    "norm": {"kind": "rmsnorm"},
    "attention": {"kind": "softmax", "num_heads": 8},
    "feedforward": {"kind": "mlp", "mlp_dim": 64},
}
EXPERTS = {"kind": "moe", "mlp_dim": 16, "num_experts": 8, "top_k": 2, "balance_rate": 0.01}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "grouped": {"attention": {"num_kv_heads": 2}, "head": "untied", "feedforward": {"kind": "glu", "mlp_dim": 64}},
    "odd": {"attention": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 4}, "num_layers": 1},
    "linear": {"attention": {"kind": "linear", "num_heads": 8, "num_kv_heads": 4, "chunk": 8, "decay": True}},
    "capacity": {"feedforward": {**EXPERTS, "capacity_factor": 1.1}},
    "dropless": {"feedforward": {**EXPERTS, "dispatch": "dropless", "shared_experts": 1}},
    "soft": {"feedforward": {"kind": "soft_moe", "mlp_dim": 16, "num_experts": 8, "slots_per_expert": 1}},
    "causal_soft": {
        "feedforward": {
            "kind": "causal_soft_moe",
            "mlp_dim": 16,
            "num_experts": 8,
            "slots_per_expert": 1,
            "block_size": 4,
        }
    },
}


def batches(count: int = 4) -> list[dict[str, np.ndarray]]:
    """Random windows, of which a part of the targets does not count."""
    random = np.random.default_rng(0)
    windows = [random.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32) for _ in range(count)]
    mask = (random.random((ROWS, LENGTH)) < 0.9).astype(np.float32)
    return [{"input": w[:, :-1], "target": w[:, 1:], "mask": mask} for w in windows]


def trainer_of(model: str, mesh: MeshConfig | None, training: dict[str, Any]) -> Trainer:
    config = validate(ModelConfig, merge(DENSE, MODELS[model]))
    settings = {"steps": STEPS, "batch_size": ROWS, "optimizer": {"kind": "adamw", "learning_rate": 3e-3}}
    scope = None if mesh is None else Scope.of(mesh, jax.devices()[: mesh.devices])
    return Trainer(Model(config), validate(TrainingConfig, merge(settings, training)), scope)


def train(trainer: Trainer) -> tuple[TrainState, list[float], str]:
    """The last state, the losses, and the text of the compiled step."""
    data = [Batch.of(batch, trainer.scope) for batch in batches()]
    state, losses = trainer.init(), []
    step = trainer.compile_step(state, data[0])
    for i in range(STEPS):
        state, metrics = step(state, data[i % len(data)])
        losses.append(float(metrics.loss))
    return state, losses, step.as_text()


def bytes_of(tree: Any) -> list[int]:
    """The bytes of a tree of arrays that each device holds."""
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return [size for size in held.values() if size]


def whole_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def read_case(case: str) -> tuple[str, MeshConfig, dict[str, Any]]:
    model, _, words = case.partition(":")
    settings = dict(word.split("=") for word in words.split(","))
    mesh = {name: int(settings.pop(name)) for name in MESH_AXES if name in settings}
    training: dict[str, Any] = {name: int(text) if text.isdigit() else text for name, text in settings.items()}
    if "ema_decay" in training:
        training["ema_decay"] = float(training["ema_decay"])
    return model, MeshConfig(**mesh), training


def measure(case: str, alone: dict[tuple, list[float]]) -> dict[str, Any]:
    """Losses on the mesh and on one device, bytes by device, and what is sent."""
    model, mesh, training = read_case(case)
    settings = {name: value for name, value in training.items() if name != "remat"}  # remat changes no number
    key = (model, json.dumps(settings))
    if key not in alone:
        alone[key] = train(trainer_of(model, None, settings))[1]
    trainer = trainer_of(model, mesh, training)
    state, losses, text = train(trainer)
    sent = [(each.kind, list(each.axes), each.shape, each.op_name) for each in collectives(text, trainer.scope.mesh)]
    return {
        "alone": alone[key],
        "losses": losses,
        "params": bytes_of(state.params),
        "whole_params": whole_bytes(state.params),
        "optimizer": bytes_of(state.optimizer),
        "whole_optimizer": whole_bytes(state.optimizer),
        "average": bytes_of(state.average),
        "sent": sent,
    }


def main() -> None:
    alone: dict[tuple, list[float]] = {}
    print(json.dumps({case: measure(case, alone) for case in sys.argv[1:]}))


if __name__ == "__main__":
    main()
