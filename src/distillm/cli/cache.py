"""The commands over the teacher's kept states: ``cache``, ``cache warm``, ``cache clear``."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..config import load_run
from .common import plain_console

Folder = Annotated[Path | None, typer.Option(help="The folder; ~/.cache/distillm/teacher unless given.")]

cache_app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
)


@cache_app.callback()
def show(context: typer.Context, folder: Folder = None) -> None:
    """What frozen teachers said, kept on disk: list it, fill it, clear it.

    Alone, it lists the teachers whose hidden states are kept: how many rows, how large, when last used, and whether
    runs can do with them alone, without the teacher itself (teacher.cached=NAME).

    \b
    distillm cache
    distillm cache warm run.yaml        fill it before a run, or a sweep of runs
    distillm cache clear --teacher NAME
    """
    if context.invoked_subcommand is not None:
        return
    from ..caching import size
    from ..model_settings import default_folder
    from ..teacher_cache import teachers

    root = folder or default_folder()
    found = teachers(root)
    if not found:
        typer.echo(f"{root}: nothing is kept")
        return
    table = Table("Name", "Teacher", "Rows", "Size", "Last used", "Alone", title=str(root))
    for kept in found:
        used = "" if kept.used is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(kept.used))
        table.add_row(kept.name, kept.teacher, str(kept.rows), size(kept.size), used, "yes" if kept.alone else "")
    plain_console().print(table)


@cache_app.command()
def warm(
    source: Annotated[str, typer.Argument(metavar="YAML|RECIPE|RUN", help="Whose teacher reads which rows.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Let the run's teacher read the rows of the run, so that no run with them waits for it, or even needs it here.

    Stopped, the same command goes on where it stopped. The run then needs `teacher.cache=disk`.
    """
    from ..commands import warm as fill
    from ..display import Display

    run = load_run(source, [*(overrides or []), "teacher.cache=disk"])
    typer.echo(fill(run, Display()))


@cache_app.command()
def clear(
    teacher: Annotated[str | None, typer.Option(help="Only this one, by the name that `distillm cache` shows.")] = None,
    folder: Folder = None,
) -> None:
    """Delete what is kept. Runs that need it make it again, but for those that do without the teacher."""
    from ..caching import size
    from ..model_settings import default_folder
    from ..teacher_cache import clear as delete

    root = folder or default_folder()
    typer.echo(f"{root}: {size(delete(root, teacher))} deleted")
