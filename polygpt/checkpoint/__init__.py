"""Checkpoints on disk: a step is saved whole or not at all, and verified before it is loaded."""

from polygpt.checkpoint.arrays import NotFiniteError, check_finite
from polygpt.checkpoint.lock import folder_lock
from polygpt.checkpoint.snapshot import Evaluation, Snapshot
from polygpt.checkpoint.steps import (
    Checkpoint,
    Keep,
    describe_saved,
    exists,
    newest,
    remove_partial,
    restore,
    save,
    step_folder,
    verified,
    verify,
)
from polygpt.checkpoint.writer import Writer

__all__ = [
    "Checkpoint",
    "Evaluation",
    "Keep",
    "NotFiniteError",
    "Snapshot",
    "Writer",
    "check_finite",
    "describe_saved",
    "exists",
    "folder_lock",
    "newest",
    "remove_partial",
    "restore",
    "save",
    "step_folder",
    "verified",
    "verify",
]
