"""What `distillm datasets` prints: the data sets and the tasks that a run can name."""

import typer

from .known import Known, known
from .tasks import load_task, tasks

HEADER = ("Name", "Task", "Splits (rows)", "Licence", "What it is")


def dataset_rows() -> list[tuple[str, ...]]:
    """A row for each known data set, as under ``HEADER``."""
    return [
        (entry.name, entry.task or "plain text", _splits(entry), entry.licence, entry.description + _pairs(entry))
        for entry in known().values()
    ]


def _splits(entry: Known) -> str:
    return ", ".join(name + ("" if rows is None else f" {rows:,}") for name, rows in entry.splits.items())


def _pairs(entry: Known) -> str:
    return f"; {', '.join(entry.pairs)}" if entry.pairs else ""


def datasets() -> None:
    """List the data sets and tasks that a run can name: `data.train=samsum`, `data.task=summarization`.

    \b
    A data set comes from the hub, or from a local folder: data.folder=DIR reads DIR/samsum/train.jsonl and so on.
    Of a translation, name chooses the languages: data.train={path: iwslt2017, name: de-en}.
    """
    for name, task, splits, licence, what in dataset_rows():
        typer.echo(f"{name:28}{task:15}{licence:27}{splits}\n{'':28}{what}")
    typer.echo("")
    for name in tasks():
        spec = load_task(name)
        typer.echo(f"task {name:15}{', '.join(spec.fields)}: {spec.description}")
