"""The commands that make what a run starts from: ``shrink``, ``tokenizer``, ``recipes``, ``schema``."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.syntax import Syntax

from ..config import Run, read_yaml, recipes
from ..errors import ConfigError
from .common import whole_numbers

recipes_app = typer.Typer(help="The shipped recipes: a YAML file for each experiment.", invoke_without_command=True)


def shrink(
    teacher: Annotated[str, typer.Argument(help="A model folder, GGUF file or hub name.")],
    output: Annotated[Path, typer.Argument(help="The student's folder.")],
    layers: Annotated[str, typer.Option(help="How many layers to keep (8), or which ones (0,4,9).")],
    decoder_layers: Annotated[
        str | None, typer.Option(help="The same for the decoder of an encoder-decoder; as the encoder's unless given.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the model folder run its own code.")] = False,
) -> None:
    """Initialise a student from some of a teacher's layers, as an ordinary model folder."""
    from ..commands import shrink_to

    kept = _layers("--layers", layers)
    decoders = None if decoder_layers is None else _layers("--decoder-layers", decoder_layers)
    typer.echo(shrink_to(teacher, output, kept, decoders, trust_remote_code))


def _layers(option: str, text: str) -> int | list[int]:
    wanted = whole_numbers(option, text) or []
    return wanted if "," in text else wanted[0]


def tokenizer(
    files: Annotated[list[str], typer.Argument(help="Text, JSON Lines, CSV or Parquet files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The tokenizer's folder.")],
    size: Annotated[int, typer.Option(min=1, help="Entries of the vocabulary.")] = 8000,
    model: Annotated[str, typer.Option(help="bpe or unigram.")] = "bpe",
) -> None:
    """Train a tokenizer on your own data, for small models from scratch."""
    from ..commands import tokenizer_to

    if model != "bpe" and model != "unigram":
        raise ConfigError(f"--model {model}: give bpe or unigram")
    typer.echo(tokenizer_to(output, files, model, size))


@recipes_app.callback()
def _list_recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        for name, path in recipes().items():
            first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
            typer.echo(f"{name:28} {first}")


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="A name from `distillm recipes`.")]) -> None:
    """Print a recipe, to be saved as your own run.yaml."""
    read_yaml(name)
    text = recipes()[name].read_text(encoding="utf-8")
    console = Console()
    if console.is_terminal:
        console.print(Syntax(text, "yaml", background_color="default"), end="", soft_wrap=True)
    else:
        typer.echo(text, nl=False)  # the console would read [brackets] as marks of its own


def schema() -> None:
    """Print the JSON schema of the configuration, so that an editor completes and explains the YAML."""
    typer.echo(json.dumps(Run.model_json_schema(), indent=2))
