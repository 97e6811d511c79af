"""The commands. `polygpt --help` imports none of their modules, and so neither JAX nor anything else that is slow."""

from __future__ import annotations

import gc
import importlib
import keyword
import os
import signal
import sys
import traceback

import click

from polygpt.cache import keep_compiled_programs
from polygpt.errors import PolygptError, suggest
from polygpt.process import keep_freed_memory, keep_interrupts

# Command -> its line in `polygpt --help`. Each is defined in the module of the same name.
COMMANDS = {
    "demo": "Train, evaluate and sample on text that is always there, in minutes.",
    "presets": "Every preset with its parameters, KV bytes and FLOPs per token; the recipes.",
    "show": "The resolved configuration of a model or recipe, the tree of its parts, its costs.",
    "tokenizer": "Train a tokenizer.",
    "data": "Prepare token shards from text.",
    "train": "Train a model from a recipe or a file.",
    "plan": "What each device of a mesh would hold, compute and send, and how long a step would take.",
    "doctor": "Devices, libraries and kernels of this machine, and whether they compute correctly.",
    "report": "Redraw a run's report, or compare several runs in one page.",
    "eval": "Perplexity, HellaSwag, or a task of lm-evaluation-harness.",
    "generate": "Continue a prompt, several, or a file of them.",
    "chat": "Talk with a model in the terminal.",
    "serve": "An OpenAI-compatible HTTP API and a page to try models in the browser.",
    "import": "Bring in a model from Hugging Face, GGUF or llama2.c.",
    "export": "Write a model for transformers or llama.cpp.",
}

# Shown where a required argument or option is missing.
EXAMPLES = {
    "train": "polygpt train own_text data.path=notes.txt --out runs/notes",
    "eval": "polygpt eval runs/notes --task perplexity --data book.txt",
    "generate": "polygpt generate runs/notes --prompt 'Once upon a time'",
    "show": "polygpt show gpt2",
    "serve": "polygpt serve runs/notes --port 8000",
    "plan": "polygpt plan gpt2_xl mesh.fsdp=256 --accelerator h100",
    "import": "polygpt import hf:owner/name --out models/name",
    "export": "polygpt export runs/notes --format hf --out exported/notes",
    "tokenizer train": "polygpt tokenizer train book.txt --kind bpe --vocab-size 4096 --out tokenizers/book",
    "data prepare": "polygpt data prepare book.txt --tokenizer tokenizers/book --out shards/book",
}

OUT_OF_MEMORY = "out of memory: lower training.batch_size, model.context_length or the model"


class _Commands(click.Group):
    """Imports a command when it is called, and suggests the nearest name for one that does not exist."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        home = f"{name}_" if keyword.iskeyword(name) else name
        return getattr(importlib.import_module(f"polygpt.cli.{home}"), home)

    def resolve_command(self, ctx: click.Context, args: list[str]):
        if args and args[0] not in COMMANDS:
            raise click.UsageError(f"no command '{args[0]}'; {suggest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="polygpt")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails; allowed anywhere.")
def polygpt(debug: bool) -> None:
    """One decoder, every GPT: compose, train, evaluate and sample from GPT-style language models.

    Every command but chat takes --json: one JSON object on standard output, everything else on standard error. Exit
    codes: 0 done, 1 failed, 2 invalid request, 130 (Ctrl-C) or 143 (SIGTERM) interrupted.
    """


def main(argv: list[str] | None = None) -> None:
    """The program: runs a command and exits with its code."""
    words = sys.argv[1:] if argv is None else argv
    debug = "--debug" in words
    # Importing JAX and tracing make objects by the hundred thousand and hardly any garbage.
    gc.set_threshold(50_000, 20, 20)
    keep_compiled_programs()
    keep_freed_memory()
    keep_interrupts()
    # As Ctrl-C does: half-written files are removed on the way out.
    signal.signal(signal.SIGTERM, _terminate)
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 must not end a run
    code = _run([word for word in words if word != "--debug"], debug)
    if "polygpt.distributed" in sys.modules:
        from polygpt.distributed import leave

        leave(code)
    if code in (130, 143):  # XLA may still be compiling in its threads, which crash when the interpreter shuts down
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    gc.freeze()  # the interpreter would go through all objects once more before it ends, which takes 0.3 s with JAX
    sys.exit(code)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""

    number = signal.SIGTERM


def _terminate(*_: object) -> None:
    raise _Terminated


def _run(words: list[str], debug: bool) -> int:
    try:
        result = polygpt.main(words, prog_name="polygpt", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.MissingParameter as error:
        return _fail(error, " ".join(error.format_message().split()) + _example(error), 2, debug)
    except click.ClickException as error:
        return _fail(error, error.format_message(), 2, debug)
    except PolygptError as error:
        return _fail(error, str(error), error.exit_code, debug)
    except (KeyboardInterrupt, click.Abort) as error:
        # click raises its own Abort from what came.
        terminated = isinstance(error, _Terminated) or isinstance(error.__cause__, _Terminated)
        return _fail(error, "interrupted", 143 if terminated else 130, debug)
    except (BrokenPipeError, SystemExit):
        # The reader has closed the pipe (`| head`). click raises SystemExit for that; without a new stdout Python would
        # report the broken pipe again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError as error:
        return _fail(error, OUT_OF_MEMORY, 1, debug)
    except OSError as error:
        return _fail(error, f"{error.filename or 'file'}: {error.strerror or error}", 1, debug)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):  # XLA's
            return _fail(error, OUT_OF_MEMORY, 1, debug)
        first = (str(error).splitlines() or [""])[0][:300]
        return _fail(error, f"a fault in polygpt: {type(error).__name__}: {first} (--debug shows where)", 1, debug)


def _example(error: click.MissingParameter) -> str:
    command = "" if error.ctx is None else error.ctx.command_path.partition(" ")[2]
    return f"\nfor example: {EXAMPLES[command]}" if command in EXAMPLES else ""


def _fail(error: BaseException, message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    shown = message.encode(errors="backslashreplace").decode()  # it may name a path that is not UTF-8
    click.echo(f"polygpt: {shown}", err=True)
    return code
