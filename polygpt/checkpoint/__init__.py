"""Checkpoints on disk: a step is saved whole or not at all, and verified before it is loaded."""

from polygpt.checkpoint.arrays import NotFiniteError, check_finite
from polygpt.checkpoint.steps import (
    Checkpoint,
    Snapshot,
    describe_saved,
    newest,
    restore,
    save,
    verified,
    verify,
)

__all__ = [
    "Checkpoint",
    "NotFiniteError",
    "Snapshot",
    "check_finite",
    "describe_saved",
    "newest",
    "restore",
    "save",
    "verified",
    "verify",
]
