"""`polygpt tokenizer train`."""

from __future__ import annotations

from pathlib import Path

import click

from polygpt.cli.output import json_option, print_json, print_result


@click.group()
def tokenizer() -> None:
    """Train a tokenizer."""


@tokenizer.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--kind", type=click.Choice(["bpe", "char", "byte"]), default="bpe", show_default=True)
@click.option("--vocab-size", type=int, help="Ids of a bpe tokenizer, special tokens included.  [default: 4096]")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder for tokenizer.json.")
@json_option
def train(files: tuple[str, ...], kind: str, vocab_size: int | None, out: Path, as_json: bool) -> None:
    """Train a tokenizer on text files (.txt, .jsonl, .csv, .parquet, .gz, .zst, globs, or `builtin`)."""
    from polygpt.config import validate
    from polygpt.data import DataConfig, open_source
    from polygpt.errors import RequestError
    from polygpt.tokenizers import TokenizerConfig, train_tokenizer

    fields = {"kind": kind} | ({"vocab_size": vocab_size} if vocab_size is not None else {})
    config = validate(TokenizerConfig, fields)
    path = out / "tokenizer.json"
    if path.exists():
        raise RequestError(f"{path}: exists already; choose another --out")
    source = open_source(validate(DataConfig, {"path": list(files)}))
    trained = train_tokenizer(config, (document.text for document in source))
    out.mkdir(parents=True, exist_ok=True)
    trained.save(path)
    facts = {"path": str(path), "kind": kind, "vocab_size": trained.vocab_size, "fingerprint": trained.fingerprint}
    if as_json:
        print_json(facts)
    else:
        print_result((name, str(value)) for name, value in facts.items())
