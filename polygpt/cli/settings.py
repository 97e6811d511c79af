"""Settings on the command line: mistakes are refused, and cached answers given, without importing JAX."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import click

from polygpt.cache import kept
from polygpt.files import expand

# `known_keys(RunConfig)`, written by `make docs`.
KEYS = Path(__file__).with_name("keys.json")


class SettingsCommand(click.Command):
    """A command with KEY=VALUE settings; if one is written as an option, the error shows how to write it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            path = _path_of(error.option_name.lstrip("-").replace("-", "_"), _keys())
            if path is None:
                raise
            given = next(word for word in words if word.partition("=")[0] == error.option_name)
            after = words[words.index(given) + 1 :][:1]
            value = given.partition("=")[2] or (after[0] if after else "VALUE")
            raise click.UsageError(f"no option {error.option_name}: settings are written {path}={value}") from None


class RunCommand(SettingsCommand):
    """A command that takes a recipe; its help lists them."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Recipes"):
            formatter.write_dl(list(recipe_titles().items()))


def recipe_titles() -> dict[str, str]:
    """The recipes that come with polygpt, each with the first line of its file. Imports nothing slow."""
    files = resources.files("polygpt").joinpath("recipes").iterdir()
    found = {file.name.removesuffix(".yaml"): file for file in files if file.name.endswith(".yaml")}
    return {name: file.read_text(encoding="utf-8").splitlines()[0].strip("# .") for name, file in sorted(found.items())}


def check_settings(fields: Mapping[str, Any], where: str = "", *, of_run: bool = True) -> None:
    """Refuses a misspelled key or kind or a wrong value in the settings of a run or a model, without importing JAX.

    Raises:
        RequestError: names the key, and what would be right.
    """
    from polygpt.config import check_keys

    check_keys(_keys(of_run), fields, where)


def check_file(path: Path) -> None:
    """Refuses a misspelled key or a wrong value in a run's YAML file, with the line it is on.

    Raises:
        RequestError: names the file, the line, and what would be right.
    """
    from polygpt.config import mistakes
    from polygpt.errors import RequestError
    from polygpt.recipes import has_short_form, recipe_fields

    problems = mistakes(_keys(), recipe_fields(str(path)))
    if has_short_form(str(path)):
        problems |= mistakes(_keys(), recipe_fields(str(path), short=True))
    if not problems:
        return
    lines, said = path.read_text(encoding="utf-8").splitlines(), []
    for key, problem in list(problems.items())[:3]:
        word = re.compile(rf"(?<![\w.]){re.escape(key.rpartition('.')[2])}\s*:")
        found = [number for number, line in enumerate(lines, start=1) if word.search(line.partition("#")[0])]
        said.append(f"{path}" + (f" line {found[0]}" if len(found) == 1 else "") + f": {problem}")
    raise RequestError("\n".join(said))


def check_sources(fields: Mapping[str, Any]) -> None:
    """Refuses the settings of a new run if a text, a tokenizer or a model that they name is not there.

    Raises:
        RequestError: names what is missing.
    """
    from polygpt.config import as_yaml, validate
    from polygpt.data import DataConfig, is_prepared, open_source
    from polygpt.errors import RequestError
    from polygpt.presets import check_model_name
    from polygpt.tokenizers import TokenizerConfig, load_tokenizer

    training = fields.get("training")
    initial = as_yaml(training.get("initial")) if isinstance(training, Mapping) else None
    if isinstance(initial, str):
        check_model_name(initial)
    try:
        data = validate(DataConfig, fields.get("data") or {})
        tokenizer = validate(TokenizerConfig, fields.get("tokenizer") or {})
    except RequestError:  # validating the whole run will name the key by its whole path
        return
    for source in data.each().values():
        if not is_prepared(source):
            open_source(source)
    if tokenizer.path is not None and not expand(tokenizer.path).exists():
        load_tokenizer(tokenizer.path)


def shown(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What `summary.shown` gives for a name and the settings as typed, cached if it is repeatable.

    Raises:
        RequestError: there is nothing by that name, or a setting is wrong.
    """
    from polygpt.config import parse_overrides
    from polygpt.folders import CONFIG
    from polygpt.recipes import named_fields

    changes = parse_overrides(overrides)
    found = named_fields(name, changes)
    if found is not None:
        fields, of_run = found
        check_settings(fields, "" if of_run else name, of_run=of_run)

    def compute() -> dict[str, Any]:
        from polygpt import summary

        return summary.shown(name, changes)

    path = expand(name)
    files = [path / CONFIG, path]
    content = next((file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()), "")
    return kept(["show", name, *overrides, content], compute, keep=lambda answer: answer["repeatable"])


def _keys(of_run: bool = True) -> dict[str, Any]:
    """The keys of a run, or of a model alone: as they come with polygpt, unless its code has been changed since."""

    def compute() -> dict[str, Any]:
        from polygpt.config import known_keys
        from polygpt.training import RunConfig

        return known_keys(RunConfig)

    keys = kept(["keys"], compute) if _edited() else json.loads(KEYS.read_text(encoding="utf-8"))
    return keys if of_run else keys["model"]["keys"]


def _edited() -> bool:
    """Whether a file of polygpt is newer than `KEYS`, by more than the time that an installation may take."""
    root = Path(__file__).parents[1]
    newest = max(path.stat().st_mtime for path in root.rglob("*.py"))
    return not KEYS.is_file() or newest > KEYS.stat().st_mtime + 60


def _path_of(key: str, keys: Mapping[str, Any]) -> str | None:
    """The shortest dotted path of a setting called `key`; None if there is none."""
    return min((path for path, name in _paths(keys) if name == key), key=lambda path: path.count("."), default=None)


def _paths(keys: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, below in keys.items():
        yield before + name, name
        for inner in [] if below is None else [below.get("keys", {}), *below.get("kinds", {}).values()]:
            yield from _paths(inner, f"{before}{name}.")
