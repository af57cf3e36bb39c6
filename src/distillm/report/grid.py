"""The runs of a sweep in one table: a row for each combination of settings, mean and spread over what is repeated."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .read import RunFolder, read_run
from .text import number, score_name

Figures = dict[str, float]


@dataclass(frozen=True)
class Cell:
    """One combination of settings: the figures of its runs, one of each per run."""

    settings: dict[str, str]
    figures: dict[str, list[float]]
    runs: int


def figures_of(run: RunFolder) -> Figures:
    """What a run came to: its best validation figures, the student's scores on each data set, and its time."""
    found: Figures = {}
    for key in ("cross_entropy", "divergence", "rouge_l"):
        best = run.best_validation(key) if key != "rouge_l" else _highest(run)
        if best is not None:
            found[f"validation {score_name(key)}"] = best
    for entry in run.scores:
        if entry.system == "student":
            found |= {f"{entry.data} {score_name(name)}": score.mean for name, score in entry.scores.items()}
    if run.seconds is not None:
        found["training seconds"] = run.seconds
    return found


def _highest(run: RunFolder) -> float | None:
    return max((v["rouge_l"] for v in run.validations if isinstance(v.get("rouge_l"), int | float)), default=None)


def grid(runs: Sequence[tuple[Mapping[str, str], Path]], repeated: str = "seed") -> list[Cell]:
    """``runs``, each with its settings, grouped by all of them but ``repeated``; in the order of first appearance."""
    cells: dict[tuple[tuple[str, str], ...], Cell] = {}
    for settings, path in runs:
        kept = {key: value for key, value in settings.items() if key != repeated}
        cell = cells.setdefault(tuple(kept.items()), Cell(kept, {}, 0))
        for name, value in figures_of(read_run(path)).items():
            cell.figures.setdefault(name, []).append(value)
        cells[tuple(kept.items())] = Cell(kept, cell.figures, cell.runs + 1)
    return list(cells.values())


def grid_cells(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text: each figure as its mean, and ± the standard deviation where it was repeated."""
    keys = list(dict.fromkeys(key for cell in cells for key in cell.settings))
    names = list(dict.fromkeys(name for cell in cells for name in cell.figures))
    body = [
        [cell.settings.get(key, "–") for key in keys]
        + [_mean_and_spread(cell.figures.get(name, [])) for name in names]
        + [str(cell.runs)]
        for cell in cells
    ]
    return [*keys, *names, "runs"], body


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = number(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {number(statistics.stdev(values))}"


def grid_markdown(cells: Sequence[Cell]) -> str:
    """The table in Markdown."""
    header, body = grid_cells(cells)
    settings = len(header) - 1 - len({name for cell in cells for name in cell.figures})
    rule = ["---" if index < settings else "---:" for index in range(len(header))]
    return "".join("| " + " | ".join(line) + " |\n" for line in [header, rule, *body])
