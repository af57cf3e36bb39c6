"""What several commands share: options, a run made of them, files, tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..config import Run, make_run, read_yaml
from ..display import Terminal
from ..errors import ConfigError, DataError
from ..paths import is_file
from . import complete

if TYPE_CHECKING:
    from ..report import Row

RunSource = Annotated[
    str,
    typer.Argument(
        metavar="YAML|RECIPE|RUN", help="A YAML file, a recipe, or a run folder.", autocompletion=complete.sources
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings by dotted name.", autocompletion=complete.settings),
]
MaxNew = Annotated[
    int | None, typer.Option(min=1, help="Longest response, in tokens; a run's own, or 256, unless given.")
]
Device = Annotated[str | None, typer.Option(help="auto (cuda, then mps, then cpu), cpu, cuda or mps.")]
Template = Annotated[
    str | None,
    typer.Option(help="alpaca, chat, one of the task's, or a Jinja template; a run's or model's own unless given."),
]
TaskName = Annotated[
    str | None, typer.Option(help="instruction, summarization, translation, chat or a YAML file; a run's own if any.")
]


def settings_for(source: str, template: str | None, device: str | None, task: str | None = None) -> dict[str, Any]:
    """The settings of a run folder with its student as it ended, or plain ones for a model.

    The device and the tracker are of the machine that trained, so they are not the run's.
    """
    folder = Path(source)
    if not is_file(folder / "run.yaml"):
        settings: dict[str, Any] = {"student": {"path": source}, "method": {"name": "sft"}, "data": {}}
    elif not (folder / "student").is_dir():
        raise DataError(f"{folder} has no student yet: the run has not ended. Go on with it by resume=auto")
    else:
        settings = read_yaml(source)
        kept = {name: settings["student"][name] for name in ("dtype", "trust_remote_code")}
        if (settings.get("teacher") or {}).get("adapter_off"):  # the student as it was is the teacher of what it became
            base = settings["student"]["path"]
            settings["teacher"] = None if base is None else {"path": base, **kept}
            settings |= {} if base else {"method": {"name": "sft"}}
        settings["student"] = {"path": str(folder / "student"), **kept}
    settings |= {"device": device or "auto", "tracker": "none"}
    if task is not None:  # what belongs to another task means nothing to it
        for name in ("template", "fields", "variables"):
            settings["data"].pop(name, None)
        settings["data"]["task"] = task
    if template is not None:
        settings["data"]["template"] = template
        if template != "chat":
            settings["data"] |= {"system": None, "teacher_system": None}
    return settings


def run_with(settings: dict[str, Any], source: str, changes: dict[str, dict[str, Any]]) -> Run:
    """``settings`` as a run, with those ``changes`` that are not None."""
    for section, values in changes.items():
        settings.setdefault(section, {}).update({name: value for name, value in values.items() if value is not None})
    return make_run(settings, source=source)


def whole_numbers(option: str, text: str | None) -> list[int] | None:
    """The numbers of ``1,2,3``; ``ConfigError`` naming ``option`` where it is something else."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} {text}: write whole numbers with commas, such as 0,4,9") from error


def show_comparison(rows: "Sequence[Row]") -> None:
    """Print the table of runs; what is the same in every row is said once, so that the scores fit a terminal."""
    from ..report import legend, said_once, table_cells

    header, body, once = said_once(*table_cells(rows))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(name)
    for row in body:
        table.add_row(*row)
    console = plain_console()
    console.print(table)
    for line in (" · ".join(once), *legend(rows)):
        console.print(line, highlight=False)


def plain_console() -> Terminal:
    """A console as wide as the terminal; in a file or a pipe nothing is squeezed."""
    console = Terminal()
    return console if console.is_terminal else Terminal(width=200)
