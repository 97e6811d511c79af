"""The band of a recipe: the validation loss its runs end with, and whether one run lies in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polygpt.errors import RequestError
from polygpt.process import command_line

if TYPE_CHECKING:
    from polygpt.training import Event, RunConfig, RunResult

# Settings that say where a text lies, which seed is drawn, what is observed, saved and shown, or how the same numbers
# are computed. A band's seeds cover the first; the others change a loss by rounding at most.
FREE = {
    "data.path",
    "data.workers",
    "data.engine",
    *(f"training.{name}seed" for name in ("", "init_", "data_")),
    *(f"training.{name}" for name in ("eval_every", "eval_batches", "save_every", "log_every", "evaluations")),
    *(f"training.{name}" for name in ("keep", "keep_every", "keep_best", "async_saving", "trackers", "samples")),
    *(f"training.{name}" for name in ("accumulation_steps", "remat")),
    "model.scan_layers",
}


@dataclass(frozen=True)
class Verdict:
    """Whether a run's validation loss (nats per token) lies in `low` to `high`."""

    val_loss: float
    low: float
    high: float

    @property
    def within(self) -> bool:
        return self.low <= self.val_loss <= self.high

    def __str__(self) -> str:
        where = "in" if self.within else "OUTSIDE"
        return f"{self.val_loss:.4f} is {where} the expected band, {self.low:.4f} to {self.high:.4f} nats per token"


def changes_of(recipe: RunConfig, config: RunConfig) -> list[str]:
    """The settings of `config` to which the band of `recipe` does not apply: `training.steps 1800 → 300`."""
    from polygpt.training import differences

    found = (
        change
        for part in ("model", "tokenizer", "data", "training")
        for change in differences(getattr(recipe, part).to_dict(), getattr(config, part).to_dict(), part)
    )
    free = tuple(f"{key}." for key in FREE)
    return [f"{key} {had} → {asked}" for key, had, asked in found if not f"{key}.".startswith(free)]


def without_band(recipe: RunConfig, config: RunConfig) -> RunConfig:
    """`config`, without the band of `recipe` if it changes what is trained."""
    if config.expected is None or config.expected != recipe.expected or not changes_of(recipe, config):
        return config
    return config.model_copy(update={"expected": None})


def check_band(name: str, config: RunConfig, recipe: RunConfig) -> None:
    """Refuses to compare a run with a band that it does not have.

    Raises:
        RequestError: the recipe states no band, or the run changes what is trained; the changes are named.
    """
    if config.expected is not None:
        return
    if recipe.expected is None:
        raise RequestError(f"--check: {name} states no expected validation loss (expected: {{val_loss, tolerance}})")
    raise RequestError(
        f"--check: the expected band is that of {name} as it stands; this run changes "
        f"{', '.join(changes_of(recipe, config))}"
    )


class HeldOutCheck:
    """A listener that ends a run before its first step if its held-out text is not the one that the band is for."""

    def __call__(self, event: Event) -> None:
        from polygpt.training import Started

        if not isinstance(event, Started) or event.config.expected is None:
            return
        wanted, found = event.config.expected.held_out, event.held_out
        if wanted is not None and wanted != found:
            command = command_line("train", "--resume", "--out", event.folder)
            raise RequestError(
                f"--check: the expected band is for another held-out text (fingerprint {wanted}; this is {found}): "
                f"other data, or another version of it. Train without comparing: {command}"
            )


def verdict(config: RunConfig, result: RunResult | Mapping[str, float]) -> Verdict | None:
    """How a finished run compares with its band; None if it has none."""
    if config.expected is None:
        return None
    loss = result["val_loss"] if isinstance(result, Mapping) else result.val_loss
    middle, tolerance = config.expected.val_loss, config.expected.tolerance
    return Verdict(loss, middle - tolerance, middle + tolerance)
