"""Training: from a configuration to a run's folder with a verified checkpoint."""

from polygpt.training.config import ExpectedConfig, RunConfig, SamplingConfig, TrainingConfig, differences
from polygpt.training.devices import ACCELERATORS, Peak, listed, listed_peak
from polygpt.training.events import (
    Compiled,
    Ended,
    Evaluated,
    Event,
    Finished,
    Listener,
    Measured,
    Note,
    RolledBack,
    RunResult,
    Sampled,
    Saved,
    Skipped,
    Spiked,
    Started,
    Stepped,
)
from polygpt.training.interrupt import Interrupted
from polygpt.training.loop import train
from polygpt.training.optimizers import OptimizerConfig, ScheduleConfig, build_optimizer
from polygpt.training.profiling import Profile
from polygpt.training.run_folder import Run, open_run, read_config
from polygpt.training.state import Batch, TrainState
from polygpt.training.step import Trainer

__all__ = [
    "ACCELERATORS",
    "Batch",
    "Compiled",
    "Ended",
    "Evaluated",
    "Event",
    "ExpectedConfig",
    "Finished",
    "Interrupted",
    "Listener",
    "Measured",
    "Note",
    "OptimizerConfig",
    "Peak",
    "Profile",
    "RolledBack",
    "Run",
    "RunConfig",
    "RunResult",
    "Sampled",
    "SamplingConfig",
    "Saved",
    "ScheduleConfig",
    "Skipped",
    "Spiked",
    "Started",
    "Stepped",
    "TrainState",
    "Trainer",
    "TrainingConfig",
    "build_optimizer",
    "differences",
    "listed",
    "listed_peak",
    "open_run",
    "read_config",
    "train",
]
