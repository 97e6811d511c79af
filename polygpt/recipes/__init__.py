"""Recipes: whole runs as YAML files, each opening with its command, its time and its expected score."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polygpt.config import as_yaml, dotted_to_nested, merge, parse_yaml, read_yaml, validate
from polygpt.errors import RequestError, suggest
from polygpt.files import expand
from polygpt.folders import CONFIG
from polygpt.presets import PRESETS, preset_fields
from polygpt.recipes.bands import HeldOutCheck, Verdict, check_band, verdict, without_band

if TYPE_CHECKING:
    from polygpt.training import RunConfig

# What imports JAX is imported where it is used: names of recipes and misspelled keys are known without it.

__all__ = [
    "HeldOutCheck",
    "Verdict",
    "as_written",
    "check_band",
    "check_placeholders",
    "has_short_form",
    "load_recipe",
    "model_changes",
    "model_fields",
    "named_fields",
    "recipe_fields",
    "recipe_names",
    "resume_config",
    "short_recipes",
    "verdict",
    "without_band",
    "without_mesh",
]


def recipe_names() -> list[str]:
    """The recipes that come with polygpt."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None, *, short: bool = False) -> RunConfig:
    """The run that a recipe or a YAML file describes, with dotted `overrides` applied.

    `model.preset` names a preset; the other fields of `model` change it. With `training.initial` they change that
    model, and its tokenizer is used. `short` takes the recipe's short form, which its section `short` describes.

    Raises:
        RequestError: no such recipe or file, a mistake in it or in an override, or shapes that do not fit.
    """
    check_placeholders(name, overrides or {}, short=short)

    from polygpt.training import RunConfig

    fields = recipe_fields(name, overrides, short=short)
    training = fields.get("training")
    initial = training.get("initial") if isinstance(training, Mapping) else None
    if isinstance(initial, str) and as_yaml(initial) is not None:
        fields["model"] = _initial_fields(str(initial), as_yaml(fields.get("model") or {}))
        fields.setdefault("tokenizer", {"kind": "initial"})
    config = validate(RunConfig, fields)
    return without_band(as_written(name, short=short), config) if config.expected is not None and overrides else config


def as_written(name: str, *, short: bool = False) -> RunConfig:
    """The recipe `name` (or a YAML file), or its short form, without overrides, placeholders included.

    Raises:
        RequestError: there is no such recipe or file, or it has a mistake.
    """
    from polygpt.training import RunConfig

    return validate(RunConfig, recipe_fields(name, short=short))


def recipe_fields(name: str, overrides: Mapping[str, Any] | None = None, *, short: bool = False) -> dict[str, Any]:
    """The plain fields of a recipe or a YAML file with dotted `overrides` laid over it, and its preset filled in.

    Raises:
        RequestError: there is no such recipe, file or preset, or it has no short form.
    """
    changes = dotted_to_nested(overrides or {})
    if isinstance(changes.get("tokenizer"), Mapping):
        from polygpt.tokenizers import implied_kind

        kind = implied_kind(changes["tokenizer"])  # takes the place of the recipe's tokenizer, whatever its kind
        changes["tokenizer"] |= {} if kind is None else {"kind": kind}
    fields = merge(_form(name, short), changes)
    if isinstance(fields.get("model"), Mapping):
        fields["model"] = model_fields(fields["model"])
    return fields


# What recipes leave to the user: the word that stands for it, and what it is.
_PLACEHOLDERS = {
    "training.initial": (
        "MODEL",
        "the model to start from: a run's folder, a Hugging Face folder, hf:owner/name, a .gguf",
    ),
    "data.path": ("FILE", "the text to train on: a .txt, .jsonl, .csv or .parquet file, a folder, a glob"),
}


def check_placeholders(name: str, overrides: Mapping[str, Any], *, short: bool = False) -> None:
    """Refuses the recipe `name` if the dotted `overrides` lack what it leaves to the user.

    Raises:
        RequestError: names the setting, or there is no such recipe.
    """
    recipe, changes = _form(name, short), dotted_to_nested(overrides)
    for key, (placeholder, meaning) in _PLACEHOLDERS.items():
        if _value(recipe, key) == placeholder and _value(changes, key) is None:
            raise RequestError(f"{name}: {key} is required ({meaning}); add {key}={placeholder}")


def resume_config(run: Path, name: str | None, overrides: Mapping[str, Any], *, short: bool = False) -> RunConfig:
    """The configuration to resume the run in folder `run` with: its own, or a recipe's (`short`: its short form's),
    with overrides.

    Raises:
        RequestError: there is no run in the folder, or as `load_recipe`.
    """
    from polygpt.training import read_config

    own = read_config(run)
    if name is None:
        return without_band(own, own.replace(**overrides))
    kept = {"training.initial": own.training.initial, "data.path": own.data.path}
    recipe = _form(name, short)
    for key, (placeholder, _) in _PLACEHOLDERS.items():  # what a recipe leaves to the user, the run has
        if _value(recipe, key) == placeholder and key not in overrides:
            overrides = {key: kept[key], **overrides}
    return load_recipe(name, overrides, short=short)


def _value(fields: Mapping[str, Any], key: str) -> Any:
    section, _, field = key.partition(".")
    inner = fields.get(section)
    return inner.get(field) if isinstance(inner, Mapping) else None


def named_fields(
    name: str, overrides: Mapping[str, Any] | None = None, *, recipe_first: bool = False
) -> tuple[dict[str, Any], bool] | None:
    """The plain fields that a preset, a recipe, a YAML file or a run's folder stands for, with `overrides`.

    Also says whether they are of a run; otherwise they are of a model alone. None for any other MODEL. A name that a
    preset and a recipe share is the preset, unless `recipe_first`.

    Raises:
        RequestError: there is nothing by that name, or an override is of a run where there is a model alone.
    """
    path = expand(name)
    own = path / CONFIG if (path / CONFIG).is_file() else path
    if name in PRESETS and not (recipe_first and name in recipe_names()):
        fields = preset_fields(name)
    elif own.suffix in (".yaml", ".yml"):
        whole = read_yaml(own)
        if {"model", "training"} <= whole.keys():
            return (recipe_fields(str(own), overrides), True)
        fields = whole.get("model", whole)
        if not isinstance(fields, Mapping):
            raise RequestError(f"{own}: model: a mapping is needed, not {fields!r}")
        fields = model_fields(fields)
    elif name in recipe_names():
        return (recipe_fields(name, overrides), True)
    elif path.exists() or name.startswith("hf:"):
        return None
    else:
        hint = suggest(name, [*PRESETS, *recipe_names()])
        raise RequestError(f"no preset, recipe, model or .yaml file '{name}'; {hint}")
    return merge(fields, model_changes(without_mesh(overrides or {}))), False


def without_mesh(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`overrides` but those of the mesh, which a model alone may be shown on."""
    return {key: value for key, value in overrides.items() if key.partition(".")[0] != "mesh"}


def model_changes(overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    """The nested changes of a model that dotted `overrides` are, written as in a run (`model.num_layers=4`).

    Raises:
        RequestError: one is not of the model.
    """
    changes = dotted_to_nested(overrides)
    for key, value in overrides.items():
        section = key.partition(".")[0]
        if section != "model":
            of_run = section in ("training", "data", "tokenizer")
            setting = "model.KEY=VALUE" if of_run else f"model.{key}={getattr(value, 'text', value)}"
            raise RequestError(f"{key}: this is a model without a run; write {setting}")
    return changes.get("model", {})


def model_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A model's fields, applied to the preset that `preset` names if there is one.

    Raises:
        RequestError: there is no such preset.
    """
    fields = dict(fields)
    name = fields.pop("preset", None)
    return fields if name is None else merge(preset_fields(str(name)), fields)


def _initial_fields(initial: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the model to start from, with `changes`."""
    from polygpt.loading import adapted, find

    return adapted(find(initial).config, None, changes).to_dict()


def short_recipes() -> list[str]:
    """The recipes that have a short form."""
    return [name for name in recipe_names() if has_short_form(name)]


def has_short_form(name: str) -> bool:
    """Whether a recipe or a YAML file has one."""
    return isinstance(_read(name).get("short"), Mapping)


def _form(name: str, short: bool) -> dict[str, Any]:
    """The fields of a recipe as it stands, or with those of its section `short` laid over them."""
    fields = _read(name)
    changes = fields.pop("short", None)
    if not short:
        return fields
    if not isinstance(changes, Mapping):
        raise RequestError(f"{name} has no short form; these have one: {', '.join(short_recipes())}")
    fields.pop("expected", None)
    return merge(fields, changes)


def _read(name: str) -> dict[str, Any]:
    path = expand(name)
    if path.suffix not in (".yaml", ".yml") and path.is_file():
        text = path.suffix in (".txt", ".jsonl", ".csv", ".parquet", ".md", ".gz", ".zst")
        hint = f"to train on a text, write own_text data.path={name}" if text else "a recipe's name ends in .yaml"
        raise RequestError(f"{name}: not a recipe; {hint}")
    if path.suffix in (".yaml", ".yml") or "/" in name:
        return read_yaml(path)
    if name not in recipe_names():
        if name in PRESETS:
            raise RequestError(
                f"'{name}' is a preset, a model alone; train it by a recipe of your own: a .yaml file with "
                f"`model: {{preset: {name}}}` beside data and training"
            )
        raise RequestError(f"no recipe '{name}'; {suggest(name, recipe_names())} (a file is named with .yaml)")
    return parse_yaml((_folder() / f"{name}.yaml").read_text(encoding="utf-8"), name)


def _folder() -> Any:
    return resources.files(__name__)
