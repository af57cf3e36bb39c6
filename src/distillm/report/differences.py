"""Whether the systems of a table differ from one of them: by paired bootstrap, from the predictions that were kept."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..evaluation import METRICS, Difference, paired_bootstrap
from ..evaluation.significance import Array
from .compare import Row

MARKS = ((0.01, "‡"), (0.05, "†"))
SAMPLES = 2000


@dataclass(frozen=True)
class Answers:
    """What a file of scores holds of one training run: the references of each row, the texts of each decoding seed."""

    references: list[list[str]]
    texts: list[list[str]]
    scores: dict[str, float]


def with_differences(rows: Sequence[Row], baseline: str) -> tuple[list[Row], list[str]]:
    """``rows`` with their differences from ``baseline`` on the same data set, and notes on those that have none.

    ``baseline`` is a run of the table (its student), ``RUN:SYSTEM``, or a system, which is then that of each row's own
    run. Tested are the scores that are made of texts row by row; they are made again from the predictions kept, and
    left out where they do not come out as they were written.

    Raises:
        ConfigError: nothing in the table has that name.
    """
    find, answers, statistics = _finder(rows, baseline), cache(_read_answers), dict[Any, Array]()
    notes: dict[str, None] = {}

    def made(name: str, path: Path) -> Array:
        if (name, path) not in statistics:
            of = answers(path)
            statistics[name, path] = np.stack([METRICS[name].statistics(t, of.references) for t in of.texts])
        return statistics[name, path]

    def tested(row: Row) -> Row:
        other = find(row)
        if other is None or other is row:
            return row
        problem = _not_comparable(row, other, answers)
        if problem is not None:
            notes[problem] = None
            return row
        found: dict[str, Difference] = {}
        for name in [n for n in row.scores if n in other.scores and n in METRICS and METRICS[n].resamples]:
            score, files = METRICS[name].score, [*row.files, *other.files]
            arrays = {path: made(name, path) for path in files}
            stale = [path for path in files if not _as_written(answers(path), name, score(arrays[path].sum(1)))]
            if stale:
                notes[f"{stale[0]}: {name} does not come out as it was written, so it is not tested"] = None
                continue
            system, base = ([arrays[path] for path in each.files] for each in (row, other))
            found[name] = paired_bootstrap(system, base, score, samples=SAMPLES)
        return replace(row, differences=found, baseline=f"{other.run}:{other.system}")

    return [tested(row) for row in rows], list(notes)


def mark(found: Difference | None) -> str:
    """† for p < 0.05 and ‡ for p < 0.01, whichever of the two is better."""
    return "" if found is None else next((sign for level, sign in MARKS if found.p < level), "")


def _finder(rows: Sequence[Row], baseline: str) -> Callable[[Row], Row | None]:
    """What gives a row of the table its baseline."""
    run, _, system = baseline.rpartition(":")
    for name, wanted in ((baseline, None), (run, system)):
        of = [row for row in rows if row.data is not None and (row.run == name or name in row.members)]
        if of:
            by_data = {row.data: row for row in of if row.system == (wanted or "student")}
            if wanted is None and not by_data:
                by_data = {row.data: row for row in of}
            if by_data:
                return lambda row: by_data.get(row.data)
    if any(row.system == baseline for row in rows):
        own = {(row.run, row.data): row for row in rows if row.system == baseline}
        return lambda row: own.get((row.run, row.data))
    there = list(dict.fromkeys([*(row.run for row in rows), *(row.system for row in rows if row.system)]))
    raise ConfigError(f"--baseline {baseline}: no such run or system in the table; there are {', '.join(there)}")


def _read_answers(path: Path) -> Answers:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rows = record.get("predictions")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    texts = [row.get("predictions") or [] for row in rows]
    seeds = min(map(len, texts), default=0)
    return Answers(
        references=[list(row.get("references") or []) for row in rows],
        texts=[[given[seed] for given in texts] for seed in range(seeds)],
        scores={
            name: score["mean"] for name, score in record["scores"].items() if isinstance(score.get("mean"), float)
        },
    )


def _not_comparable(row: Row, other: Row, answers: Callable[[Path], Answers]) -> str | None:
    found = [answers(path) for path in (*row.files, *other.files)]
    both = f"{row.run} ({row.system}) and {other.run} ({other.system})"
    if not row.files or not other.files or not all(each.texts and all(each.references) for each in found):
        return f"{both} are not tested on {row.data}: their predictions were not kept"
    if any(each.references != found[0].references for each in found):
        return f"{both} are not tested on {row.data}: they were not scored on the same rows"
    return None


def _as_written(answers: Answers, name: str, per_seed: Array) -> bool:
    written = answers.scores.get(name)
    return written is not None and math.isclose(written, float(per_seed.mean()), rel_tol=1e-6, abs_tol=1e-6)
