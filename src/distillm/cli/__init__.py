"""The command line. Heavy modules are imported inside the commands, so that help is quick."""

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..errors import DistillmError, StorageError
from ..listing import datasets
from ..screen import on_screen, visible
from .cache import cache_app
from .check import check
from .judge import judge
from .make import recipes_app, schema, shrink, tokenizer
from .push import push
from .score import evaluate_command, generate
from .show import analyse, compare, report
from .start import init, next_steps
from .train import demo, sweep, train
from .watch import watch

EXIT_CODES = """
Exit codes: 0 done · 1 a defect of distillm (with a traceback; please report it) · 2 a setting, file or model cannot be
used · 3 training diverged, or runs of a sweep failed · 4 a file could not be written or read back · 5 a server no
longer answers, or judging is incomplete · 6 another process of the run ended or hangs · 130 stopped by Ctrl-C · 143
stopped by SIGTERM.
"""

app = typer.Typer(
    name="distillm",
    help="Distil a large language model into a small one.",
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode=None,
)

# Every command, in the order of the help. A new one: write it in the file of its topic, or in a file of its own.
app.command("init")(init)
app.command("check")(check)
app.command("train")(train)
app.command("sweep")(sweep)
app.command("eval")(evaluate_command)
app.command("generate")(generate)
app.command("judge")(judge)
app.command("compare")(compare)
app.command("report")(report)
app.command("watch")(watch)
app.command("analyse")(analyse)
app.command("push")(push)
app.command("shrink")(shrink)
app.command("tokenizer")(tokenizer)
app.command("datasets")(datasets)
app.command("schema")(schema)
app.command("demo")(demo)
app.add_typer(recipes_app, name="recipes")
app.add_typer(cache_app, name="cache")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"distillm {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(visible(next_steps(Path.cwd())))


def main() -> None:
    """Run the command line; what a user can mend is said without a traceback."""
    # Read by GNU's OpenMP when torch is loaded. Its threads spin for milliseconds at each barrier: beside one
    # busy program on two cores that makes a pass several times slower, and idle ones gain nothing (docs/log.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal has no character for is written out, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except DistillmError as error:
        number = os.environ.get("RANK", "0")  # what several processes have in common is said by the first
        typer.echo(f"error: {error}" if number == "0" else f"process {number}: {error}".splitlines()[0], err=True)
        sys.exit(error.exit_code)
    except OSError as error:  # a path that is none, a folder that may not be read, a full disk
        typer.echo(on_screen(f"error: {error.filename or 'a file'}: {error.strerror or error}"), err=True)
        sys.exit(StorageError.exit_code)
    except Exception as error:
        if "OutOfMemoryError" not in type(error).__name__:
            raise
        typer.echo(
            "error: out of memory. Lower train.micro_batch_size, and generation.batch_size and evaluation.batch_size "
            "(--batch-size of distillm eval) if it ran out while generating; the result stays the same.",
            err=True,
        )
        sys.exit(2)
