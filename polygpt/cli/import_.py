"""`polygpt import`."""

from __future__ import annotations

from pathlib import Path

import click

from polygpt.cli.output import dtype_option, json_option, overrides_argument, print_json, print_result, reading
from polygpt.cli.settings import SettingsCommand, check_settings
from polygpt.process import command_line


@click.command("import", cls=SettingsCommand)
@click.argument("source", metavar="SOURCE")
@overrides_argument
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The new folder.")
@dtype_option
@json_option
def import_(source: str, overrides: tuple[str, ...], out: Path, dtype: str | None, as_json: bool) -> None:
    """Convert a model into a polygpt folder, verified by SHA-256 sums.

    SOURCE is a Hugging Face folder, hf:owner/name[@revision], a .gguf file, or a llama2.c .bin file. Settings that do
    not change the shapes of its weights can be changed; model.vocab_size=50304 pads the vocabulary,
    model.context_length=1024 shortens the context.
    """
    from polygpt.config import dotted_to_nested, parse_overrides
    from polygpt.errors import RequestError
    from polygpt.presets import check_model_name

    if out.exists():
        raise RequestError(f"{out}: exists already; choose another --out")
    changes = parse_overrides(overrides)
    check_model_name(source)
    check_settings(dotted_to_nested(changes))

    from polygpt.loading import save

    lm = reading(source, dtype, changes)
    save(lm, out)
    facts = {
        "model": str(out),
        "source": source,
        **{key: value for key, value in lm.origin.facts.items() if key in ("format", "architecture")},
        "parameters": lm.num_parameters,
        "dtype": lm.config.param_dtype,
        "tokenizer": lm.tokenizer.kind if lm.has_tokenizer else None,
    }
    if as_json:
        print_json(facts)
        return
    print_result((key, f"{value:,}" if isinstance(value, int) else str(value)) for key, value in facts.items())
    if lm.has_tokenizer:
        print_result([("next", command_line("generate", out, "--prompt", "…"))])
