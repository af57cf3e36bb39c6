"""Several runs in one table: a row for each system that a run scored on a data set."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .read import RunFolder, Score, read_runs
from .text import duration, mean_std, method_name, number, parameter_count, score_name


@dataclass(frozen=True)
class Row:
    """One system of one run on one data set; ``system`` and ``data`` are None for a run without an evaluation."""

    run: str
    path: Path
    system: str | None
    data: str | None
    method: str | None
    student_parameters: int | None
    scores: dict[str, Score]
    best_divergence: float | None
    steps: int | None
    seconds: float | None


def compare_table(runs: Sequence[Path]) -> list[Row]:
    """One row for each (run, system, data set), in the order of ``runs``; ``DataError`` where one is no run folder."""
    return [row for run in read_runs(runs) for row in rows_of(run)]


def rows_of(run: RunFolder) -> list[Row]:
    """The rows of one run that has been read; one row without scores where it has no evaluation."""
    systems = [(entry.system, entry.data, entry.scores) for entry in run.scores] or [(None, None, dict[str, Score]())]
    return [
        Row(
            run=run.name,
            path=run.path,
            system=system,
            data=data,
            method=method_name(run),
            student_parameters=run.parameters("student"),
            scores=scores,
            best_divergence=run.best_validation("divergence"),
            steps=run.last_step,
            seconds=run.seconds,
        )
        for system, data, scores in systems
    ]


def score_columns(rows: Sequence[Row]) -> list[str]:
    """The scores that any row has, in the order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.scores))


def table_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows as rounded text, for a terminal or a page: each score as mean ± std (an en dash: not known)."""
    columns = score_columns(rows)
    header = ["Run", "System", "Data", "Method", "Student", *map(score_name, columns), "Seeds"]
    header += ["Best validation divergence", "Steps", "Time"]
    body = [
        [
            row.run,
            row.system or "–",
            row.data or "–",
            row.method or "–",
            parameter_count(row.student_parameters),
            *(mean_std(name, row.scores.get(name)) for name in columns),
            str(max(score.num_seeds for score in row.scores.values())) if row.scores else "–",
            number(row.best_divergence),
            "–" if row.steps is None else str(row.steps),
            duration(row.seconds),
        ]
        for row in rows
    ]
    return header, body


def as_markdown(rows: Sequence[Row]) -> str:
    """The rounded table in Markdown."""
    header, body = table_cells(rows)
    rule = ["---" if index < 4 else "---:" for index in range(len(header))]
    lines = [header, rule, *body]
    return "".join("| " + " | ".join(map(_markdown_cell, line)) + " |\n" for line in lines)


def as_csv(rows: Sequence[Row]) -> str:
    """The table in CSV with numbers as they are in the files: three columns (mean, std, seeds) for each score."""
    columns = score_columns(rows)
    parts = ["mean", "std", "seeds"]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["run", "path", "system", "data", "method", "student_parameters"]
        + [f"{name}_{part}" for name in columns for part in parts]
        + ["best_validation_divergence", "steps", "seconds"]
    )
    for row in rows:
        cells: list[object] = [row.run, str(row.path), row.system, row.data, row.method, row.student_parameters]
        for name in columns:
            score = row.scores.get(name)
            cells += [score.mean, score.std, score.num_seeds] if score else [None, None, None]
        writer.writerow([*cells, row.best_divergence, row.steps, row.seconds])
    return text.getvalue()


def _markdown_cell(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())
