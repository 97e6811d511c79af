"""Optimizers and learning-rate schedules, each a frozen configuration with one method, and averages of weights."""

from polygpt.training.optimizers.adaptive import AdamWConfig, LionConfig, SGDConfig
from polygpt.training.optimizers.average import start_average, update_average
from polygpt.training.optimizers.base import OptimizerConfig
from polygpt.training.optimizers.build import Optimizer, build_optimizer
from polygpt.training.optimizers.groups import GroupConfig, ParameterGroups
from polygpt.training.optimizers.matrices import AdafactorConfig, MuonConfig
from polygpt.training.optimizers.schedule_free import ScheduleFreeConfig
from polygpt.training.optimizers.schedules import (
    SCHEDULES,
    ConstantConfig,
    CosineConfig,
    InverseSqrtConfig,
    LinearConfig,
    ScheduleConfig,
    StepCount,
    TrapezoidConfig,
    WSDConfig,
    in_steps,
)

# SOAP, Shampoo and PSGD are missing: optax has none of them, and no other library for JAX that does is maintained.
OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "adamw": AdamWConfig,
    "muon": MuonConfig,
    "lion": LionConfig,
    "adafactor": AdafactorConfig,
    "schedule_free": ScheduleFreeConfig,
    "sgd": SGDConfig,
}

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "AdafactorConfig",
    "AdamWConfig",
    "ConstantConfig",
    "CosineConfig",
    "GroupConfig",
    "InverseSqrtConfig",
    "LinearConfig",
    "LionConfig",
    "MuonConfig",
    "Optimizer",
    "OptimizerConfig",
    "ParameterGroups",
    "SGDConfig",
    "ScheduleConfig",
    "ScheduleFreeConfig",
    "StepCount",
    "TrapezoidConfig",
    "WSDConfig",
    "build_optimizer",
    "in_steps",
    "start_average",
    "update_average",
]
