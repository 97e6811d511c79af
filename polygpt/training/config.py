"""The configuration of a run: model, tokenizer, data, training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, PositiveInt, model_validator

from polygpt.config import Config, Seed, Tuple, slot
from polygpt.data import DataConfig
from polygpt.evaluation import EVALUATIONS, EvaluationConfig
from polygpt.model import ModelConfig
from polygpt.sharding import MeshSetting
from polygpt.tokenizers import TokenizerConfig
from polygpt.training.loss_scale import LossScaleConfig
from polygpt.training.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    AdamWConfig,
    CosineConfig,
    GroupConfig,
    OptimizerConfig,
    ScheduleConfig,
    StepCount,
)


class SamplingConfig(Config):
    """Samples generated during training: every `every` steps and at the end (0: never), one for each of `prompts`.

    Without prompts (null), they are beginnings of lines of the held-out text.
    """

    every: StepCount = 0
    prompts: Annotated[tuple[str, ...], Field(strict=False)] | None = ("\n",)
    max_new_tokens: PositiveInt = 100
    temperature: Annotated[float, Field(ge=0)] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    seed: Seed = 0


class Seeds(NamedTuple):
    """The seeds of a run."""

    init: int
    data: int
    dropout: int


class TrainingConfig(Config):
    """How a model is trained.

    Numbers of steps (`eval_every`, `save_every`, `samples.every`, a schedule's `warmup_steps`) that are below 1 are a
    share of the run's.

    Attributes:
        initial: a MODEL whose weights training starts from; None draws new ones.
        steps: optimizer steps.
        batch_size: windows per step; a step sees batch_size · context_length tokens.
        accumulation_steps: a batch is computed in this many equal parts, one after the other, in as much less memory;
            the update is that of the whole batch.
        remat: what is computed again for the gradient rather than kept in memory. `none`: nothing. `dots`: within each
            block all but the products with weights. `block`: the whole block, from its input. `full`: all blocks,
            from a few of their inputs.
        loss_scale: of float16 alone.
        max_skipped_steps: a step whose loss, gradient or updated weights are not finite changes nothing; this many in
            a row stop the run.
        spike_threshold: a loss this many deviations above its mean is a spike (see `guard.py`); None looks for none.
        on_spike: `log` reports it. `rollback` also goes back to the newest periodic checkpoint (the start, if there is
            none) and leaves out the batches up to the spike.
        optimizer: chosen by `kind`.
        schedule: chosen by `kind`; for the optimizer `schedule_free`, the default is `constant` with a warm-up of 0.05.
        groups: learning rates and weight decay of parameters by their names; each names the pattern that it is for.
        ema_decay: an exponential moving average of the weights with this decay is evaluated and saved as the model. The
            decay warms up with the number of updates t, as min(ema_decay, (1 + t) / (10 + t)). None keeps none.
        clip_norm: the gradient's global norm is clipped to this; None does not clip.
        seed: of dropout, and of initial values and batches unless they have their own.
        init_seed: of initial values; None is `seed`.
        data_seed: of the order of batches; None is `seed`.
        eval_every: steps between evaluations on the fixed validation windows; 0 evaluates at the end only.
        eval_batches: how many batches of validation windows, evenly spaced, an evaluation during training reads; None
            reads all. The evaluation at the end always reads all.
        save_every: steps between checkpoints; 0 saves only at the end and when interrupted.
        keep: how many of the newest checkpoints are kept.
        keep_every: steps that are multiples of this are kept, too; 0 for none.
        keep_best: the step with the lowest validation loss is saved and kept, too, as the MODEL `RUN/checkpoints/best`.
            All evaluations are compared on the windows that `eval_batches` says.
        async_saving: training goes on while a thread writes the checkpoint, from a copy in the host's memory.
        log_every: steps whose metrics are fetched from the device together.
        samples: text sampled during training.
        evaluations: further evaluations, during training and at the end, each chosen by `kind`.
        trackers: where metrics are also sent: `tensorboard` writes event files into the run's folder; `wandb` and
            `trackio` need their packages (`pip install 'polygpt[wandb]'`).
    """

    initial: str | None = None
    steps: Annotated[int, Field(gt=0, lt=2**31)]
    batch_size: PositiveInt
    accumulation_steps: PositiveInt = 1
    remat: Literal["none", "block", "dots", "full"] = "none"
    loss_scale: LossScaleConfig = LossScaleConfig()
    max_skipped_steps: PositiveInt = 10
    spike_threshold: Annotated[float, Field(gt=0)] | None = 6.0
    on_spike: Literal["log", "rollback"] = "log"
    optimizer: slot(OptimizerConfig, OPTIMIZERS, default="adamw") = AdamWConfig()
    schedule: slot(ScheduleConfig, SCHEDULES, default="cosine") = CosineConfig()
    groups: Tuple[GroupConfig] = ()
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    seed: Seed = 0
    init_seed: Seed | None = None
    data_seed: Seed | None = None
    eval_every: StepCount = 0
    eval_batches: PositiveInt | None = None
    save_every: StepCount = 0
    keep: PositiveInt = 2
    keep_every: StepCount = 0
    keep_best: bool = False
    async_saving: bool = True
    log_every: PositiveInt = 10
    samples: SamplingConfig = SamplingConfig()
    evaluations: Tuple[slot(EvaluationConfig, EVALUATIONS)] = ()
    trackers: Tuple[Literal["tensorboard", "wandb", "trackio"]] = ()

    @property
    def seeds(self) -> Seeds:
        """The seeds, the defaults filled in."""
        own = (self.seed if seed is None else seed for seed in (self.init_seed, self.data_seed))
        return Seeds(*own, dropout=self.seed)

    @model_validator(mode="before")
    @classmethod
    def _constant_for_schedule_free(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        optimizer, schedule = data.get("optimizer"), data.get("schedule", {})
        kind = optimizer.get("kind") if isinstance(optimizer, Mapping) else getattr(optimizer, "kind", optimizer)
        if kind != "schedule_free" or not isinstance(schedule, Mapping) or "kind" in schedule:
            return data
        return {**data, "schedule": {"kind": "constant", "warmup_steps": 0.05, **schedule}}

    @model_validator(mode="after")
    def _one_average(self) -> TrainingConfig:
        if self.ema_decay is not None and self.optimizer.averages:
            raise ValueError(
                f"ema_decay: {self.optimizer.kind} averages the weights already; leave it out (ema_decay=)"
            )
        return self

    @model_validator(mode="after")
    def _best_is_known(self) -> TrainingConfig:
        if self.keep_best and self.eval_every == 0:
            raise ValueError(
                "keep_best needs evaluations during training to choose by; give training.eval_every (such as 0.1, ten "
                "times in the run)"
            )
        return self

    @model_validator(mode="after")
    def _accumulation_divides_the_batch(self) -> TrainingConfig:
        if self.batch_size % self.accumulation_steps:
            fitting = [count for count in range(1, self.batch_size + 1) if self.batch_size % count == 0]
            raise ValueError(
                f"accumulation_steps={self.accumulation_steps} does not divide batch_size={self.batch_size}; these do: "
                + ", ".join(map(str, fitting))
            )
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> TrainingConfig:
        titles = [evaluation.title for evaluation in self.evaluations]
        twice = next((title for index, title in enumerate(titles) if title in titles[:index]), None)
        if twice is not None:
            raise ValueError(f"evaluations: two are called '{twice}'; give one of them another name (name: ...)")
        return self


class ExpectedConfig(Config):
    """The band in which a recipe's runs end: `val_loss` ± `tolerance` nats per token, over all held-out text.

    Attributes:
        val_loss: mean over `seeds` runs that differ in `training.seed` alone.
        tolerance: half the width of the interval that holds one more run with a probability of 99 %: the standard
            deviation of the runs x the 99.5 % point of Student's t x sqrt(1 + 1/seeds).
        seeds: how many runs were made.
        held_out: the first 12 digits of the fingerprint of the held-out tokens; a band says nothing of another text.
    """

    val_loss: Annotated[float, Field(gt=0)]
    tolerance: Annotated[float, Field(gt=0)]
    seeds: Annotated[int, Field(ge=5)]
    held_out: Annotated[str, Field(pattern="^[0-9a-f]{12}$")] | None = None


class RunConfig(Config):
    """The whole run, from text to a trained model.

    With `training.initial`, model and tokenizer may be left out of a recipe: they are those of the initial model.
    `mesh` spreads the run over several devices: how many each axis has (`mesh.fsdp=8`), or `auto`: all devices share
    the batch, or as many as divide it. `expected` is the band of a recipe; a run that changes what is trained has none.
    """

    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig
    mesh: MeshSetting = None
    expected: ExpectedConfig | None = None

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


def differences(mine: Any, theirs: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """The dotted keys at which two plain configurations differ, with both values."""
    if isinstance(mine, dict) and isinstance(theirs, dict) and set(mine) == set(theirs):
        for name in mine:
            yield from differences(mine[name], theirs[name], f"{key}.{name}")
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for index, (had, asked) in enumerate(zip(mine, theirs, strict=True)):
            yield from differences(had, asked, f"{key}.{index}")
    elif mine != theirs:
        yield key, mine, theirs
