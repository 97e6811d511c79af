"""`polygpt export`."""

from __future__ import annotations

from pathlib import Path

import click

from polygpt.cli.output import json_option, print_json, print_result, reading

_TYPES = {"hf": ("float32", "bfloat16", "float16"), "gguf": ("f32", "f16", "bf16", "q8_0")}


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--format", "form", type=click.Choice(list(_TYPES)), required=True, help="A folder, or a GGUF file.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The new folder or file.")
@click.option("--dtype", help="Of the weights: float32, bfloat16, float16; for gguf f32, f16, bf16, q8_0.")
@json_option
def export(model: str, form: str, out: Path, dtype: str | None, as_json: bool) -> None:
    """Write a model for transformers (hf) or llama.cpp (gguf).

    A part that has no counterpart there is refused by name.
    """
    from polygpt.errors import RequestError, suggest
    from polygpt.presets import check_model_name

    check_model_name(model)
    if dtype is not None and dtype not in _TYPES[form]:
        raise RequestError(f"--dtype {dtype}: not a type of --format {form}; {suggest(dtype, _TYPES[form])}")
    if out.exists():
        raise RequestError(f"{out}: exists already; choose another --out")

    from polygpt import interop

    write, choose = {
        "hf": (interop.export_huggingface, interop.choose_family),
        "gguf": (interop.export_gguf, interop.choose_architecture),
    }[form]
    lm = reading(model, None, {}, check=choose)
    tokenizer = lm.tokenizer if lm.has_tokenizer else None
    architecture = write(
        out,
        lm.config,
        lm.params,
        tokenizer,
        **({} if dtype is None else {"dtype": dtype}),  # each format has its own default
        stop_tokens=lm.origin.stop_tokens,
        chat_template=lm.origin.chat_template,
        facts={"name": _name(model), **lm.origin.facts},
    )
    size = sum(path.stat().st_size for path in ([out] if out.is_file() else out.iterdir()))
    facts = {"out": str(out), "format": form, "architecture": architecture, "parameters": lm.num_parameters}
    facts["bytes"] = size
    if as_json:
        print_json(facts)
        return
    print_result((key, f"{value:,}" if isinstance(value, int) else str(value)) for key, value in facts.items())


def _name(model: str) -> str:
    """The last part of a MODEL, such as the name of a run's folder."""
    return Path(model).absolute().name.removesuffix(".gguf") if Path(model).exists() else model.rpartition("/")[2]
