"""Checkpoints of a small tree, and what lies in their folder."""

import jax.numpy as jnp

from polygpt import checkpoint
from polygpt.checkpoint import Evaluation, Keep, Snapshot

TREE = {
    "matrix": jnp.linspace(-1, 1, 96, dtype=jnp.float32).reshape(8, 12) / 3,
    "nested": {"half": jnp.arange(7, dtype=jnp.bfloat16) / 7, "count": jnp.int32(41)},
    "odd values": jnp.array([-0.0, 1e-45, 3.4e38], jnp.float32),
}


def save(root, step, tree=TREE, **settings):
    training = {"momentum": jnp.full(5, step / 7, jnp.float32)}
    snapshot = Snapshot(step, tree, training, {"data": "abc"}, 2, 1, (1.5, 1 / step), Evaluation(1, 0.5), 99.0)
    return checkpoint.save(root, snapshot, Keep(**settings))


def steps(root):
    return sorted(path.name for path in root.iterdir())


def files_of_a_step(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
