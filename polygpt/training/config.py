"""The configuration of a run: model, tokenizer, data, training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from polygpt.config import Config, Seed, Tuple, slot
from polygpt.data import DataConfig
from polygpt.evaluation import EVALUATIONS, EvaluationConfig
from polygpt.model import ModelConfig
from polygpt.tokenizers import TokenizerConfig
from polygpt.training.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    AdamWConfig,
    CosineConfig,
    OptimizerConfig,
    ScheduleConfig,
)


class SamplingConfig(Config):
    """Samples written during training: every `every` steps (0: never), continuing each of `prompts`."""

    every: NonNegativeInt = 0
    prompts: Annotated[tuple[str, ...], Field(strict=False)] = ("\n",)
    max_new_tokens: PositiveInt = 100
    temperature: Annotated[float, Field(ge=0)] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    seed: Seed = 0


class TrainingConfig(Config):
    """How a model is trained.

    Attributes:
        initial: a MODEL whose weights training starts from; None draws new ones.
        steps: optimizer steps.
        batch_size: windows a step; a step sees batch_size · context_length tokens.
        optimizer, schedule: chosen by `kind`.
        clip_norm: the gradient's global norm is clipped to this; None does not clip.
        seed: of initialisation, batches and dropout.
        eval_every: steps between evaluations on the fixed validation windows; 0 evaluates at the end only.
        eval_batches: how many batches of validation windows, evenly spread, an evaluation along the way reads;
            None reads all. The evaluation at the end always reads all.
        save_every: steps between checkpoints; 0 saves at the end (and when interrupted) only.
        keep: how many of the newest checkpoints stay.
        log_every: steps whose metrics are fetched from the device together.
        samples: text sampled along the way.
        evaluations: what else the model is evaluated by along the way and at the end, each chosen by `kind`.
    """

    initial: str | None = None
    steps: Annotated[int, Field(gt=0, lt=2**31)]
    batch_size: PositiveInt
    optimizer: slot(OptimizerConfig, OPTIMIZERS, default="adamw") = AdamWConfig()
    schedule: slot(ScheduleConfig, SCHEDULES, default="cosine") = CosineConfig()
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    seed: Seed = 0
    eval_every: NonNegativeInt = 0
    eval_batches: PositiveInt | None = None
    save_every: NonNegativeInt = 0
    keep: PositiveInt = 2
    log_every: PositiveInt = 10
    samples: SamplingConfig = SamplingConfig()
    evaluations: Tuple[slot(EvaluationConfig, EVALUATIONS)] = ()

    @model_validator(mode="after")
    def _names_differ(self) -> TrainingConfig:
        titles = [evaluation.title for evaluation in self.evaluations]
        twice = next((title for index, title in enumerate(titles) if title in titles[:index]), None)
        if twice is not None:
            raise ValueError(f"evaluations: two are called '{twice}'; give one of them another name (name: ...)")
        return self


class RunConfig(Config):
    """Everything a run is: from text to a trained model.

    With `training.initial` the recipe need not name model and tokenizer: they are the initial model's.
    """

    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig

    @model_validator(mode="after")
    def _tokenizer_of_initial(self) -> RunConfig:
        initial = self.training.initial
        if (self.tokenizer.kind == "initial") != (initial is not None):
            raise ValueError(
                "tokenizer.kind=initial is that of training.initial, which is not given"
                if initial is None
                else f"training.initial={initial} brings its own tokenizer; give tokenizer.kind=initial (or take the "
                "recipe finetune)"
            )
        return self
