"""What is kept of a finished run: figures and the rows' scores, no text; a JSON file for each, and what reads them."""

import hashlib
import json
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from distillm.config import Run, read_yaml
from distillm.evaluation import METRICS, Difference, paired_bootstrap
from distillm.evaluation.significance import Array
from distillm.report import read_run
from distillm.report.read import RunFolder

from . import plan
from .plan import Study

PROVENANCE = ("distillm", "python", "torch", "transformers", "git", "started", "threads", "device", "machine", "rows")
CURVE = ("cross_entropy", "divergence", "rouge_l")


@dataclass(frozen=True)
class Result:
    """One run of a study, as its file says."""

    name: str
    record: dict[str, Any]
    slowdown: float = 1.0
    """How many times as long as the least disturbed run of its study it took for the same work."""

    @property
    def seconds(self) -> float:
        """Training, what the student wrote for it included, had nothing slowed it down."""
        return self.record["seconds"] / self.slowdown

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of each part of training, likewise."""
        return {name: seconds / self.slowdown for name, seconds in self.record["parts"].items()}

    @property
    def curve(self) -> list[list[float | None]]:
        """``[step, seconds, *CURVE]`` of each validation, the seconds likewise."""
        return [[step, seconds / self.slowdown, *values] for step, seconds, *values in self.record["curve"]]

    def score(self, data: str, name: str) -> float | None:
        """A score on a test set, the mean over decoding seeds."""
        found = self.record["scores"].get(data, {}).get(name)
        return None if found is None else found["mean"]

    @property
    def kept_validation(self) -> list[float | None]:
        """The row of the curve at the step that was kept."""
        return next(point for point in self.curve if point[0] == self.record["kept_step"])

    @property
    def student_share(self) -> float:
        """The share of rows trained on that the student wrote."""
        batches = self.record["batches"]
        share = (batches["generated"] + batches["replayed"]) / sum(batches.values())
        return share / 2 if self.record["method"]["name"] == "distillm2" else share  # the other half is the teacher's

    def statistics(self, data: str, metric: str) -> Array:
        """``[decoding seeds, rows, k]``, whose sums over rows make the score."""
        kept = self.record["statistics"][data]
        seeds = [[np.broadcast_to(column, kept["num_rows"]) for column in columns] for columns in kept[metric]]
        return np.stack([np.stack(columns, axis=-1).astype(np.float64) for columns in seeds])


Found = dict[str, tuple[Study, dict[str, Result]]]
"""The studies, each with the results that are kept of it, by name."""


def settings_digest(run: Run, before: Sequence[Run] = ()) -> str:
    """A name for all settings that are not the defaults, of ``run`` and of the runs whose models it takes."""
    return name_of([_settings(each) for each in (run, *before)])


def name_of(settings: Any) -> str:
    """A short name that other settings have not."""
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _settings(run: Run) -> dict[str, Any]:
    left_out = {"output", "resume", "overwrite", "provenance"}
    settings = run.model_dump(mode="json", exclude=left_out, exclude_defaults=True)
    settings["method"] = {"name": run.method.name} | settings.get("method", {})  # a name is its section's default
    return dict(sorted(settings.items()))


@cache
def code(revision: str | None) -> str:
    """The git tree of the package at ``revision``."""
    return "unknown" if revision is None else _git("rev-parse", f"{revision}:src/distillm")


def changed_code() -> bool:
    """Whether the package differs from that of the last commit, whose name its runs would bear."""
    return bool(_git("status", "--porcelain", "src"))


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()


def record_of(folder: Path, metrics: Sequence[str], digest: str) -> dict[str, Any]:
    """What is kept of the finished run in ``folder``; ``metrics`` are those whose rows are kept for tests."""
    found = read_run(folder)
    spent, at = 0.0, {0: 0.0}
    for step in found.steps:
        spent += step["seconds"]
        at[step["step"]] = spent
    sizes = found.provenance["models"]
    scored = [s for s in found.scores if s.system == "student"]
    return {
        "settings": digest,
        "method": found.config["method"],
        "code": code(found.provenance["git"]),
        **{key: found.provenance[key] for key in PROVENANCE},
        "parameters": {name: sizes[name]["parameters"] for name in sizes},
        "steps": found.last_step,
        "batch_size": found.config["train"]["batch_size"],
        "tokens": sum(step["tokens"] for step in found.steps),
        "seconds": round(spent, 3),
        "parts": {name: round(seconds, 3) for name, seconds in found.parts.items()},
        "batches": {
            kind: sum(s["batch"] == kind for s in found.steps) for kind in ("dataset", "generated", "replayed")
        },
        **{name: _mean_of(found, name) for name in ("age", "buffer_age", "truncated")},
        "probability": found.steps[-1].get("probability"),
        "events": _events(found),
        "kept_step": max((e["step"] for e in found.events if e["event"] == "best"), default=found.last_step),
        "curve": [
            [v["step"], round(at[v["step"]], 3), *(_rounded(v.get(k)) for k in CURVE)] for v in found.validations
        ],
        "before": {s.data: _scores(s) for s in found.scores if s.system == "before"},
        "scores": {s.data: _scores(s) for s in scored},
        "statistics": {s.data: _statistics(s.path, metrics) for s in scored if s.path is not None},
    }


def failed(folder: Path, digest: str) -> dict[str, Any] | None:
    """What is kept of a run whose training failed: how far it came. Of one that something else ended there is nothing
    to tell: it goes on when the study does."""
    found = read_run(folder) if (folder / "run.yaml").is_file() else None
    if found is None or found.stopped is None or found.stopped["event"] != "failed":
        return None
    return {"settings": digest, "failed": found.last_step or 0}


def _mean_of(found: RunFolder, name: str) -> float | None:
    """The mean over the steps that say so."""
    values = [step[name] for step in found.steps if step.get(name) is not None]
    return _rounded(statistics.fmean(values)) if values else None


def _events(found: RunFolder) -> dict[str, int]:
    kinds = [event["event"] for event in found.events]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _scores(scored: Any) -> dict[str, dict[str, float | None]]:
    return {name: {"mean": score.mean, "std": score.std} for name, score in scored.scores.items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _statistics(path: Path, metrics: Sequence[str]) -> dict[str, Any]:
    """The columns of each metric's statistics, for each decoding seed; one that never changes is one number."""
    file = json.loads(path.read_text(encoding="utf-8"))
    rows, references = file["predictions"], [row["references"] for row in file["predictions"]]

    def columns(found: Array) -> list[Any]:
        made = [[int(v) if v == int(v) else round(v, 3) for v in column] for column in found.T.tolist()]
        return [column[0] if len(set(column)) == 1 else column for column in made]

    kept: dict[str, Any] = {
        name: [
            columns(METRICS[name].statistics([row["predictions"][seed] for row in rows], references))
            for seed in range(len(file["seeds"]))
        ]
        for name in metrics
    }
    kept |= {"num_rows": len(rows), "ids": _span([row["id"] for row in rows])}
    return kept | {"signatures": file.get("signatures", {})}


def _span(ids: list[str]) -> str | list[str]:
    """``set:0-999`` for the ids of so many rows in turn, else the ids."""
    name = ids[0].rpartition(":")[0]
    plain = [f"{name}:{i}" for i in range(len(ids))]
    return f"{name}:0-{len(ids) - 1}" if ids == plain else ids


def as_json(record: dict[str, Any]) -> str:
    """A line for each key, so that files are small and changes can be read."""
    lines = (f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in record.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def load(folder: Path) -> dict[str, Result]:
    """The results of a study by the names of their runs.

    Other work came and went while the runs were made. The backward pass of a token is nearly the same work in all runs
    of a student, so that what it took tells how much a run was slowed down.
    """
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    paces = {
        name: (record["parameters"]["student"], record["parts"]["student backward"] / record["tokens"])
        for name, record in records.items()
        if record.get("parts", {}).get("student backward")
    }
    best = {size: min(pace for other, pace in paces.values() if other == size) for size, _ in paces.values()}
    slowdowns = {name: pace / best[size] for name, (size, pace) in paces.items()}
    return {name: Result(name, record, slowdowns.get(name, 1.0)) for name, record in records.items()}


def of_variant(results: dict[str, Result], variant: str) -> list[Result]:
    """The runs of a variant that came to their end, one for each seed that was made; or the one of a stage."""
    named = [result for name, result in results.items() if variant in (name, name.rpartition("_seed-")[0])]
    return [result for result in named if "failed" not in result.record]


def starts_of(study: Study, found: Found) -> dict[str, Result]:
    """What the variants of ``study`` start from, where that is a student that some study trained."""
    usual = read_yaml(str(plan.HERE / study.base))["student"]["path"]
    starts: dict[str, Result] = {}
    for variant, settings in study.variants.items():
        if "student" not in settings:
            *_, of, stage, _ = Path(settings.get("student.path", usual)).parts
            if stage in found[of][1]:
                starts[variant] = found[of][1][stage]
    return starts


def drawn(runs: Sequence[Result]) -> bool:
    """Whether these are runs of a variant; a stage is one model, and not a draw of any."""
    return "_seed-" in runs[0].name


def num_seeds(*groups: Sequence[Result]) -> int:
    """The training seeds that each variant has, stages aside."""
    return min((len(runs) for runs in groups if drawn(runs)), default=1)


def mean_std(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    """Mean and deviation over training seeds; None where a value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def pooled(run: Result, sets: Sequence[str], metric: str) -> float:
    """A score on the rows of all ``sets`` together, the mean over decoding seeds."""
    arrays = np.concatenate([run.statistics(data, metric) for data in sets], axis=1)
    return float(np.mean(METRICS[metric].score(arrays.sum(1))))


def difference(system: Sequence[Result], baseline: Sequence[Result], sets: Sequence[str], metric: str) -> Difference:
    """Of two variants on the rows of all ``sets``, by rows and training seeds.

    Raises:
        ValueError: they were scored on different rows.
    """
    for data in sets:
        if len({json.dumps(result.record["statistics"][data]["ids"]) for result in (*system, *baseline)}) > 1:
            raise ValueError(f"{system[0].name} and {baseline[0].name} were scored on different rows of {data}")
    arrays = [
        [np.concatenate([result.statistics(data, metric) for data in sets], axis=1) for result in each]
        for each in (system, baseline)
    ]
    return paired_bootstrap(*arrays, lambda sums: _score(metric, sums))


_scored: dict[tuple[str, bytes], Array] = {}


def _score(metric: str, sums: Array) -> Array:
    """Remembered: the pages compare each run with many others, always on the same draws of rows."""
    key = metric, hashlib.sha256(sums.tobytes()).digest()
    if key not in _scored:
        _scored[key] = METRICS[metric].score(sums)
    return _scored[key]
