"""What is kept of a finished run: figures and the rows' scores, no text; a JSON file for each, and what reads them."""

import hashlib
import json
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distillm.config import Run
from distillm.evaluation import METRICS, Difference, paired_bootstrap
from distillm.evaluation.significance import Array
from distillm.report import read_run
from distillm.report.read import RunFolder

PROVENANCE = ("distillm", "python", "torch", "transformers", "git", "started", "threads", "device", "machine", "rows")
CURVE = ("cross_entropy", "divergence", "rouge_l")


@dataclass(frozen=True)
class Result:
    """One run of a study, as its file says."""

    name: str
    record: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Training, what the student wrote for it included."""
        return self.record["seconds"]

    def score(self, data: str, name: str) -> float | None:
        """A score on a test set, the mean over decoding seeds."""
        found = self.record["scores"].get(data, {}).get(name)
        return None if found is None else found["mean"]

    @property
    def student_share(self) -> float:
        """The share of steps that trained on what the student wrote."""
        batches = self.record["batches"]
        return (batches["generated"] + batches["replayed"]) / max(1, sum(batches.values()))

    def statistics(self, data: str, metric: str) -> Array:
        """``[decoding seeds, rows, k]``, whose sums over rows make the score."""
        kept = self.record["statistics"][data]
        seeds = [[np.broadcast_to(column, kept["num_rows"]) for column in columns] for columns in kept[metric]]
        return np.stack([np.stack(columns, axis=-1).astype(np.float64) for columns in seeds])


def settings_digest(run: Run) -> str:
    """A name for all settings that a run's result depends on and that are not the defaults."""
    left_out = {"output", "resume", "overwrite", "provenance"}
    settings = run.model_dump(mode="json", exclude=left_out, exclude_defaults=True)
    settings["method"] = {"name": run.method.name} | settings.get("method", {})  # a name is its section's default
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def code() -> str:
    """The git tree of the package as it is checked out; with a mark where files have changed since."""

    def asked(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    return asked("rev-parse", "HEAD:src/distillm") + ("+changes" if asked("status", "--porcelain", "src") else "")


def record_of(run: Run, folder: Path, metrics: Sequence[str], source: str) -> dict[str, Any]:
    """What is kept of the finished run in ``folder``; ``metrics`` are those whose rows are kept for tests."""
    found = read_run(folder)
    spent, at = 0.0, dict[int, float]()
    for step in found.steps:
        spent += step["seconds"]
        at[step["step"]] = spent
    models = found.provenance["models"]
    scored = [s for s in found.scores if s.system == "student"]
    return {
        "settings": settings_digest(run),
        "method": found.config["method"],
        "code": source,
        **{key: found.provenance[key] for key in PROVENANCE},
        "parameters": {name: models[name]["parameters"] for name in models},
        "steps": found.last_step,
        "batch_size": run.train.batch_size,
        "kept_step": max((e["step"] for e in found.events if e["event"] == "best"), default=found.last_step),
        "seconds": round(spent, 3),
        "parts": {name: round(seconds, 3) for name, seconds in found.parts.items()},
        "flops": found.flops,
        "peak_bytes": found.peak_bytes,
        "batches": {
            kind: sum(s["batch"] == kind for s in found.steps) for kind in ("dataset", "generated", "replayed")
        },
        "events": _events(found),
        "probability": found.steps[-1].get("probability"),
        "curve": [
            [v["step"], round(at.get(v["step"], 0.0), 3), *(_rounded(v.get(key)) for key in CURVE)]
            for v in found.validations
        ],
        "scores": {
            s.data: {name: {"mean": score.mean, "std": score.std} for name, score in s.scores.items()} for s in scored
        },
        "statistics": {s.data: _rows(s.path, metrics) for s in scored if s.path is not None},
    }


def _events(found: RunFolder) -> dict[str, int]:
    kinds = [event["event"] for event in found.events]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _rows(path: Path, metrics: Sequence[str]) -> dict[str, Any]:
    """The columns of each metric's statistics, for each decoding seed; one that never changes is one number."""
    rows = json.loads(path.read_text(encoding="utf-8"))["predictions"]
    references = [row["references"] for row in rows]
    seeds = range(len(rows[0]["predictions"]))

    def columns(found: Array) -> list[Any]:
        made = [[int(v) if v == int(v) else round(v, 3) for v in column] for column in found.T.tolist()]
        return [column[0] if len(set(column)) == 1 else column for column in made]

    kept: dict[str, Any] = {
        name: [columns(METRICS[name].statistics([row["predictions"][s] for row in rows], references)) for s in seeds]
        for name in metrics
    }
    return kept | {"num_rows": len(rows), "ids": _span([row["id"] for row in rows])}


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
    """The results of a study by the names of their runs."""
    return {path.stem: Result(path.stem, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))}


def of_variant(results: dict[str, Result], variant: str) -> list[Result]:
    """The runs of a variant, one for each seed that was made."""
    return [result for name, result in results.items() if name.rpartition("_seed-")[0] == variant]


def mean_std(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    """Mean and deviation over training seeds; None where a value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def difference(system: Sequence[Result], baseline: Sequence[Result], data: str, metric: str) -> Difference:
    """Of two variants on a test set, by rows and training seeds."""
    arrays = [[result.statistics(data, metric) for result in each] for each in (system, baseline)]
    return paired_bootstrap(*arrays, METRICS[metric].score)
