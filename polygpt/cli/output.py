"""What commands share: common options, loading with a progress bar, JSON, tables and trees."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from polygpt.language_model import LanguageModel
    from polygpt.sharding import Scope

json_option: Callable = click.option(
    "--json", "as_json", is_flag=True, help="JSON on standard output, everything else on standard error."
)


class _Types(click.Choice):
    """Names of numeric types; an abbreviation is answered with the name it stands for."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        meant = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16"}
        meant |= {"fp32": "float32", "f32": "float32", "i8": "int8", "q8": "int8", "i4": "int4", "q4": "int4"}
        if meant.get(str(value).lower()) in self.choices:
            self.fail(f"{value!r}: did you mean '{meant[value.lower()]}'?", param, ctx)
        return super().convert(value, param, ctx)


def sampling_options(command: Callable) -> Callable:
    """The options of every command that samples."""
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


class Whole(type(click.INT)):
    """A whole number in a range. click's own type shows the range as a formula in `--help`; here the text says it."""

    def __init__(self, least: int, most: int | None = None):
        self.least, self.most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = super().convert(value, param, ctx)
        if number < self.least or (self.most is not None and number > self.most):
            self.fail(f"{number} is not {self.described}", param, ctx)
        return number

    @property
    def described(self) -> str:
        return f"at least {self.least}" if self.most is None else f"in {self.least}..{self.most}"


SEED = Whole(0, 2**32 - 1)
_SAMPLING = (
    click.option(
        "--temperature",
        type=float,
        default=0.8,
        show_default=True,
        help="Divides the logits: lower values make likely tokens likelier; 0 always takes the likeliest.",
    ),
    click.option("--top-k", type=int, help="Sample from the K likeliest tokens only."),
    click.option(
        "--top-p",
        type=float,
        default=0.95,
        show_default=True,
        help="Sample only from the likeliest tokens that together reach this probability.",
    ),
    click.option(
        "--min-p",
        type=float,
        default=0.0,
        show_default=True,
        help="Sample only from tokens whose probability is at least this fraction of the likeliest one's.",
    ),
    click.option(
        "--seed",
        type=SEED,
        default=0,
        show_default=True,
        help="Seed of the random numbers; the same seed gives the same text.",
    ),
)
dtype_option: Callable = click.option(
    "--dtype",
    type=_Types(["float32", "bfloat16", "float16"]),
    help="Data type of weights and activations.  [default: as stored]",
)
weights_option: Callable = click.option(
    "--weights",
    type=_Types(["float32", "bfloat16", "float16", "int8", "int4"]),
    help="Store the weights in this type (activations keep --dtype); fewer bits decode faster.",
)
overrides_argument: Callable = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


mesh_argument: Callable = click.argument("mesh", nargs=-1, metavar="[mesh.AXIS=N]...")


def mesh_of(words: Sequence[str], rows: int | None = None) -> Scope | None:
    """The mesh of `mesh.AXIS=N` words, for batches of `rows` (None: of any number); None for one device.

    Raises:
        RequestError: a word sets something else, or the mesh is not of the devices that there are.
    """
    if not words:
        return None
    from polygpt.config import dotted_to_nested, parse_overrides, validate
    from polygpt.errors import RequestError

    changes = parse_overrides(words)
    other = next((key for key in changes if key.partition(".")[0] != "mesh"), None)
    if other is not None:
        raise RequestError(f"{other}: only the mesh can be set here, such as mesh.tensor=4")
    import jax

    from polygpt.sharding import MeshOnly, Scope, choose_mesh

    asked = validate(MeshOnly, dotted_to_nested(changes)).mesh
    mesh, note = choose_mesh(asked, rows or jax.device_count(), jax.device_count())
    if note is not None:
        click.echo(note, err=True)
    # `auto` may have chosen fewer than there are.
    return None if mesh is None else Scope.of(mesh, jax.devices()[: mesh.devices] if asked == "auto" else None)


def reading(name: str, dtype: str | None, overrides: Mapping[str, Any], **how: Any) -> LanguageModel:
    """Loads MODEL, with a progress bar and warnings on standard error.

    `overrides` are dotted keys below `model`; `how` is passed on to `polygpt.load`.
    """
    from polygpt.config import as_yaml
    from polygpt.presets import check_model_name
    from polygpt.recipes import model_changes

    check_model_name(name)
    if sys.stderr.isatty():
        click.echo(f"loading {name} …", err=True)

    from polygpt.loading import load

    changes = as_yaml(model_changes(overrides))
    with weights_bar() as on_progress:
        return load(
            name,
            dtype=dtype,
            overrides=changes,
            warn=lambda line: click.echo(f"warning: {line}", err=True),
            on_progress=on_progress,
            **how,
        )


def reading_draft(name: str, dtype: str | None, **how: Any) -> LanguageModel:
    """Loads the model of `--draft`, as `reading` does; an error says that it is about that one."""
    from polygpt.errors import PolygptError

    try:
        return reading(name, dtype, {}, **how)
    except PolygptError as error:
        error.args = (f"--draft {name}: {error}",)
        raise


@contextmanager
def weights_bar() -> Iterator[Callable[[int], None]]:
    """Progress callback that counts weights on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield int
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.completed:,} weights read"),
        transient=True,
        console=Console(stderr=True),
        refresh_per_second=5,
    ) as progress:
        task = progress.add_task("", total=None)
        yield lambda count: progress.advance(task, count)


def check_sampler(model: str, settings: Mapping[str, Any]) -> None:
    """Refuses settings of sampling that are out of range before MODEL is loaded; None is one that was not given.

    Raises:
        RequestError: names the setting, or there is no such model.
    """
    from polygpt.config import validate
    from polygpt.presets import check_model_name

    check_model_name(model)  # at once: the next import is JAX's
    from polygpt.generation import Sampler

    names = settings.keys() & Sampler.model_fields.keys()
    validate(Sampler, {name: settings[name] for name in names if settings[name] is not None})


def text_of(data: bytes, name: str) -> str:
    """The text of UTF-8 bytes, which came from `name`.

    Raises:
        RequestError: they are not UTF-8; it names the first wrong byte.
    """
    from polygpt.errors import RequestError

    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{name}: not UTF-8 text (byte {error.start})") from None


def as_typed(text: str, name: str) -> str:
    """`text`, which was given on the command line or in a terminal.

    Raises:
        RequestError: it is not UTF-8; it names the first wrong character.
    """
    from polygpt.errors import RequestError

    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name}: not UTF-8 text (character {error.start})") from None
    return text


def print_json(value: Any) -> None:
    """Prints `value` as one line of JSON on standard output."""
    click.echo(json.dumps(value, allow_nan=False, ensure_ascii=False))


def print_table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Prints a table on standard output; `columns` are (heading, `left` or `right`)."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for heading, side in columns:
        table.add_column(heading, justify=side, no_wrap=side == "right")
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    _console(200).print(table)


def print_tree(root: Mapping[str, Any]) -> None:
    """Prints the tree of a model's parts (`Node.to_dict`): their settings; shape, axes and count of each parameter."""
    from rich.text import Text
    from rich.tree import Tree

    rows = [(4 * depth, node) for depth, node in _walk(root) if node["shape"] is not None]
    names = max(indent + len(node["name"]) for indent, node in rows)
    shapes = max(len(_shape(node)) for _, node in rows)
    axes = max(len(", ".join(node["axes"])) for _, node in rows)
    counts = len(f"{root['size']:,}")
    console = _console(1000)
    # Counts are aligned in a column if the terminal is wide enough.
    before = names + 2 + shapes + 2 + axes
    before, counts = (before, counts) if before + 2 + counts <= console.width else (0, 0)

    def label(node: Mapping[str, Any], depth: int) -> Text:
        if node["shape"] is not None:
            name = f"{node['name']:<{names - 4 * depth}}"
            text = Text(f"{name}  {_shape(node):<{shapes}}  {', '.join(node['axes'])}")
        else:
            text = Text.assemble((node["name"], "bold"), f": {node['note']}" if node["note"] else "")
        if node["size"]:
            text.pad_right(max(before - 4 * depth - len(text), 0))
            text.append(f"  {node['size']:>{counts},}", style="cyan")
        return text

    def grow(tree: Tree, node: Mapping[str, Any], depth: int) -> Tree:
        for child in node["children"]:
            grow(tree.add(label(child, depth + 1)), child, depth + 1)
        return tree

    console.print(grow(Tree(label(root, 0)), root, 0))


def _shape(parameter: Mapping[str, Any]) -> str:
    return "×".join(map(str, parameter["shape"])) or "scalar"


def _walk(node: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[int, Mapping[str, Any]]]:
    yield depth, node
    for child in node["children"]:
        yield from _walk(child, depth + 1)


def _console(width: int) -> Any:
    from rich.console import Console

    # A pipe has no width: rows must not be wrapped for a program that reads them.
    return Console(highlight=False, width=None if sys.stdout.isatty() else width)


def print_schedule(points: Mapping[str, Any], width: int = 60, height: int = 8) -> None:
    """Draws a learning rate over the steps (`summary.schedule_points`) with braille characters."""
    steps, rates = points["steps"], points["learning_rate"]
    peak = max(rates)
    label = f"{peak:.3g}"
    click.echo(f"learning rate: {points['kind']}")
    for row, line in enumerate(_braille([rate / peak for rate in rates], width, height)):
        left = label if row == 0 else "0" if row == height - 1 else ""
        click.echo(f"{left:>{len(label)}} │{line}".rstrip())
    first, last = f"step {steps[0]:,}", f"{steps[-1]:,}"
    click.echo(f"{'':{len(label)}} └{'─' * width}")
    click.echo(f"{'':{len(label) + 2}}{first}{last:>{width - len(first)}}")


def _braille(values: Sequence[float], width: int, height: int) -> list[str]:
    """A line through `values` (between 0 and 1) on a grid of 2 by 4 dots for each character."""
    columns, rows = 2 * width, 4 * height
    levels = [round(values[round(x * (len(values) - 1) / (columns - 1))] * (rows - 1)) for x in range(columns)]
    bits = ((0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08))  # of each column of dots, from below
    cells = [[0] * width for _ in range(height)]
    for x, level in enumerate(levels):
        before = levels[max(x - 1, 0)]
        # A steep stretch is drawn as a vertical line from just beyond the level before.
        low = min(level, before + 1) if before < level else level
        high = max(level, before - 1) if before > level else level
        for y in range(low, high + 1):
            cells[height - 1 - y // 4][x // 2] |= bits[x % 2][y % 4]
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in row) for row in cells]


def print_result(rows: Iterable[tuple[str, str]]) -> None:
    """Prints names and values, aligned, on standard output."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")
