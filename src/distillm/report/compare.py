"""Several runs in one table: a row for each system on a data set, over the training runs that differ only in seed."""

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation import Difference
from .read import RunFolder, Score, Scores, mapping, read_systems
from .text import method_name


@dataclass(frozen=True)
class Row:
    """One system on one data set; ``system`` and ``data`` are None for a run without an evaluation.

    ``runs`` training runs were made, called ``members``; with several, a score is their mean and deviation, and so are
    the other figures their means. ``seeds`` are those of decoding, ``files`` those the scores stand in. After a test
    against a baseline ``differences`` holds what came out for each score that can be tested.
    """

    run: str
    path: Path
    system: str | None
    data: str | None
    method: str | None
    student_parameters: int | None
    scores: dict[str, Score]
    best_divergence: float | None
    steps: float | None
    seconds: float | None
    runs: int = 1
    seeds: int | None = None
    members: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    baseline: str | None = None
    differences: dict[str, Difference] = field(default_factory=dict[str, Difference])


def compare_table(runs: Sequence[Path], *, grouped: bool = False) -> list[Row]:
    """One row for each (run, system, data set), in the order of ``runs``, which may be files of scores too.

    ``grouped``: runs that differ in nothing but their seed share a row.

    Raises:
        DataError: one is no run folder, and no file of scores.
    """
    found = read_systems([Path(path) for path in runs])
    return _labelled(same_but_seed(found) if grouped else [[run] for run in found])


def rows_together(runs: Sequence[RunFolder]) -> list[Row]:
    """The rows of runs that have been read; those that differ in nothing but their seed share theirs."""
    return _labelled(same_but_seed(runs))


def _labelled(groups: Sequence[Sequence[RunFolder]]) -> list[Row]:
    labels: list[str] = []
    rows: list[Row] = []
    for group in groups:
        label = group[0].name if len(group) == 1 else group_name(group)
        labels.append(group[0].name if label in labels else label)
        rows += _rows(group, labels[-1])
    return rows


def same_but_seed(runs: Sequence[RunFolder]) -> list[list[RunFolder]]:
    """Runs whose settings differ in the seed alone, together; each seed counts once in a group.

    Where a run is kept, and where the teacher's responses are, are no settings here.
    """
    groups: dict[str, list[RunFolder]] = {}
    for number, run in enumerate(runs):
        settings = {key: value for key, value in run.config.items() if key not in ("seed", "output", "provenance")}
        settings["data"] = {k: v for k, v in mapping(settings, "data").items() if k != "responses_file"}
        key = json.dumps(settings, sort_keys=True, default=str) if run.config else str(number)
        while run.config.get("seed") in [other.config.get("seed") for other in groups.get(key, [])]:
            key += " again"
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def group_name(runs: Sequence[RunFolder]) -> str:
    """What the names of runs are without their seeds: ``kd_seed-1`` and ``kd_seed-2`` are ``kd``."""
    names = [run.name for run in runs]
    for before in (r"seed[-_=. ]?", r"s", r""):
        written = [rf"(^|[-_. /]){before}{run.config.get('seed')}(?=$|[-_. /])" for run in runs]
        left = {re.sub(seed, "", name).strip("-_. /") for seed, name in zip(written, names, strict=True)}
        if len(left) == 1 and left != {""}:
            return left.pop()
    return f"{names[0]} and {len(names) - 1} more"


def score_columns(rows: Sequence[Row]) -> list[str]:
    """The scores that any row has, in the order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.scores))


def _rows(group: Sequence[RunFolder], label: str) -> list[Row]:
    entries: dict[tuple[str | None, str | None], list[tuple[RunFolder, Scores | None]]] = {}
    for run in group:
        for scored in run.scores:
            entries.setdefault((scored.system, scored.data), []).append((run, scored))
    return [
        _row(label, system, data, found)
        for (system, data), found in (entries or {(None, None): [(run, None) for run in group]}).items()
    ]


def _row(label: str, system: str | None, data: str | None, found: Sequence[tuple[RunFolder, Scores | None]]) -> Row:
    runs, scored = [run for run, _ in found], [scores for _, scores in found if scores is not None]
    names = list(dict.fromkeys(name for entry in scored for name in entry.scores))
    one = {name: [entry.scores[name] for entry in scored if name in entry.scores] for name in names}
    decoding = [score.num_seeds for scores in one.values() for score in scores]
    steps = _mean([run.last_step for run in runs])
    return Row(
        run=label,
        path=runs[0].path,
        system=system,
        data=data,
        method=method_name(runs[0]),
        student_parameters=runs[0].parameters("student"),
        scores={name: scores[0] if len(found) == 1 else _over_runs(scores) for name, scores in one.items()},
        best_divergence=_mean([run.best_validation("divergence") for run in runs]),
        steps=int(steps) if steps is not None and steps == int(steps) else steps,
        seconds=_mean([run.seconds for run in runs]),
        runs=len(runs),
        seeds=max(decoding, default=None),
        members=tuple(run.name for run in runs),
        files=tuple(entry.path for entry in scored if entry.path is not None),
    )


def _over_runs(scores: Sequence[Score]) -> Score:
    means = [score.mean for score in scores]
    return Score(statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else None, len(means))


def _mean(values: Sequence[Any]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return statistics.fmean(known) if known else None
