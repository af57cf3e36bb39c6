"""The command that publishes: ``push``."""

from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .common import plain_console


def push(
    source: Annotated[str, typer.Argument(metavar="RUN|FOLDER", help="A run folder, or a model folder.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where it goes on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Only for you and your group.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, instead of main; made if there is none.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be uploaded.")] = False,
) -> None:
    """Upload a student with its model card to the Hugging Face hub.

    \b
    distillm push runs/mine me/my-student --dry-run
    distillm push runs/mine me/my-student --private

    Weights, configuration, tokenizer, README.md and licences go, and nothing else that lies there. Look at the
    README.md first: it is published as it is. Log in by `hf auth login`, or give a token with write access in HF_TOKEN.
    """
    from ..publish import address_of, parcel_of, upload

    repository = address_of(repository)
    parcel = parcel_of(source)
    table = Table("file", "bytes", box=SIMPLE_HEAD, pad_edge=False)
    table.columns[1].justify = "right"
    for name, size in parcel.files.items():
        table.add_row(name, f"{size:,}")
    table.add_section()
    table.add_row("together", f"{sum(parcel.files.values()):,}")
    console = plain_console()
    console.print(table)
    for note in (*(f"left out: {name}" for name in parcel.left_out[:8]), *parcel.notes):
        console.print(note)
    if len(parcel.left_out) > 8:
        console.print(f"left out: {len(parcel.left_out) - 8} more")
    if not dry_run:
        typer.echo(upload(parcel, repository, private=private, revision=revision))
