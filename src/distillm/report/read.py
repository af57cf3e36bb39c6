"""Run folders as they are on disk, whole or partial: what cannot be read is told in ``notes`` and left out."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..settings_text import load_yaml

Record = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """One score of one system: mean and standard deviation over ``num_seeds`` decoding seeds."""

    mean: float
    std: float | None
    num_seeds: int


@dataclass(frozen=True)
class Scores:
    """The scores of one system on one data set (one file of ``eval/``)."""

    system: str
    data: str
    scores: dict[str, Score]
    num_rows: int | None = None
    seeds: list[int] = field(default_factory=list[int])
    decoding: Record = field(default_factory=dict[str, Any])
    path: Path | None = None
    speed: float | None = None
    """Tokens a second while it answered, on the machine that scored it."""


@dataclass(frozen=True)
class RunFolder:
    """The contents of one run folder; steps and validations are in order, each step once."""

    path: Path
    name: str
    config: Record
    config_text: str
    steps: list[Record]
    validations: list[Record]
    events: list[Record]
    times: list[Record]
    samples: list[Record]
    scores: list[Scores]
    has_student: bool
    notes: list[str]
    tokens: list[Record] = field(default_factory=list[Record])

    @property
    def provenance(self) -> Record:
        """Versions, command, machine and models, as saved with the configuration."""
        return mapping(self.config, "provenance")

    @property
    def last_step(self) -> int | None:
        """The last step that is recorded, or None."""
        return self.steps[-1]["step"] if self.steps else None

    @property
    def seconds(self) -> float | None:
        """Seconds spent in the recorded steps, or None where none says."""
        spent = [seconds for step in self.steps if (seconds := number_in(step, "seconds")) is not None]
        return math.fsum(spent) if spent else None

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of each part of the work, the longest first."""
        spent: dict[str, float] = {}
        for record in self.times:
            for name in mapping(record, "seconds"):
                spent[name] = spent.get(name, 0.0) + (number_in(mapping(record, "seconds"), name) or 0.0)
        return dict(sorted(spent.items(), key=lambda item: item[1], reverse=True))

    @property
    def flops(self) -> float:
        """Operations of the matrix products that the models' rows needed."""
        return math.fsum(number_in(record, "flops") or 0.0 for record in self.times)

    @property
    def peak_bytes(self) -> float | None:
        """The most memory that the run held, where it is known."""
        return max((held for record in self.times if (held := number_in(record, "peak_bytes"))), default=None)

    @property
    def stopped(self) -> Record | None:
        """The event of an interruption or a failure that no step and no resumption has followed."""
        turns = [event for event in self.events if event.get("event") in ("interrupted", "failed", "resumed")]
        if not turns or turns[-1]["event"] == "resumed" or (self.last_step or 0) > turns[-1]["step"]:
            return None
        return turns[-1]

    @property
    def planned(self) -> int | None:
        """The steps that the run is to make, where it says."""
        settled = number_in(mapping(self.provenance, "resolved"), "train.steps")
        found = settled or number_in(mapping(self.config, "train"), "steps")
        return None if found is None else int(found)

    @property
    def going_on(self) -> bool:
        """Whether training has begun and not come to an end, as far as the files tell: it may have been killed."""
        if self.last_step is None or self.stopped is not None:
            return False
        return not self.has_student or self.last_step < (self.planned or 0)

    @property
    def finished(self) -> bool:
        """Whether the trained student is there and the run did not stop on its way."""
        return self.has_student and self.stopped is None

    def parameters(self, model: str) -> int | None:
        """Number of parameters of ``"teacher"`` or ``"student"``, where the run recorded it."""
        count = number_in(mapping(self.provenance, "models", model), "parameters")
        return None if count is None else int(count)

    def best_validation(self, key: str) -> float | None:
        """The smallest validation value called ``key``, or None."""
        return min(
            (value for record in self.validations if (value := number_in(record, key)) is not None), default=None
        )


def mapping(record: Mapping[str, Any], *keys: str) -> Record:
    """The mapping found by following ``keys``; empty where there is none."""
    found: Any = record
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def number_in(record: Mapping[str, Any], key: str) -> float | None:
    """The finite number at ``key``, or None."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def read_run(path: Path) -> RunFolder:
    """Read a run folder, whole or partial; ``DataError`` where ``path`` is not one or may not be read."""
    try:
        return _read_run(path)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def _read_run(path: Path) -> RunFolder:
    _check_is_run(path)
    notes: list[str] = []
    config, config_text = _read_config(path / "run.yaml", notes)
    metrics = _read_lines(path / "metrics.jsonl", notes)
    steps = _by_step([record for record in metrics if record.get("kind") == "step"])
    validations = _by_step([record for record in metrics if record.get("kind") == "validation"])
    events = [record for record in metrics if record.get("kind") == "event" and _has_step(record)]
    times = [record for record in metrics if record.get("kind") == "time"]
    run = RunFolder(
        path=path,
        name=path.resolve().name,
        config=config,
        config_text=config_text,
        steps=steps,
        validations=validations,
        events=events,
        times=times,
        samples=[row for row in _read_lines(path / "samples.jsonl", notes) if _has_step(row) and "id" in row],
        scores=_read_scores(sorted((path / "eval").glob("*.json")), notes),
        has_student=(path / "student").is_dir(),
        notes=notes,
        tokens=_read_tokens(path / "tokens.jsonl", notes),
    )
    notes.extend(_missing(run))
    return run


def read_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """Read several run folders, with names that tell them apart; ``DataError`` where none is given or one is no run."""
    if not paths:
        raise DataError("no run folder given: name at least one folder that `distillm train` wrote")
    return named([read_run(Path(path)) for path in paths])


def read_systems(paths: Sequence[Path]) -> list[RunFolder]:
    """As ``read_runs``, but a path may also be a file of scores, which is taken for a run that has nothing else."""
    if any(path.is_file() and path.suffix == ".json" for path in paths):
        return named([_read_alone(path) if path.suffix == ".json" else read_run(path) for path in paths])
    return read_runs(paths)


def _read_alone(path: Path) -> RunFolder:
    notes: list[str] = []
    try:
        scores = _read_scores([path], notes)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if not scores:
        raise DataError(f"{path} holds no scores as `distillm eval` writes them. {' '.join(notes)}")
    return RunFolder(
        path=path,
        name=path.stem,
        config={},
        config_text="",
        steps=[],
        validations=[],
        events=[],
        times=[],
        samples=[],
        scores=scores,
        has_student=False,
        notes=notes,
    )


def named(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """``runs`` with names that tell them apart."""
    names = [run.name for run in runs]
    labels: list[str] = []
    for run in runs:
        label = run.name if names.count(run.name) == 1 else "/".join(run.path.resolve().parts[-2:])
        while label in labels:
            label += " (again)"
        labels.append(label)
    return [replace(run, name=label) for run, label in zip(runs, labels, strict=True)]


def _check_is_run(path: Path) -> None:
    looked_for = "a run folder holds run.yaml and metrics.jsonl, as `distillm train` writes them"
    if not path.exists():
        raise DataError(f"{path} does not exist: {looked_for}")
    if not path.is_dir():
        raise DataError(f"{path} is a file, not a run folder: give the folder that holds it ({looked_for})")
    if not (path / "run.yaml").is_file() and not (path / "metrics.jsonl").is_file():
        names = sorted(entry.name for entry in path.iterdir())
        holds = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
        raise DataError(f"{path} is not a run folder: {looked_for}; neither is there (it holds {holds})")


def _read_config(path: Path, notes: list[str]) -> tuple[Record, str]:
    if not path.is_file():
        notes.append("run.yaml is missing: the settings, the models and the command are not known.")
        return {}, ""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = load_yaml(text)
    except ValueError as error:
        notes.append(f"run.yaml is not valid YAML ({str(error).splitlines()[0]}): it is shown as it is.")
        return {}, text
    if not isinstance(config, dict):
        notes.append("run.yaml holds no settings: the models and the command are not known.")
        return {}, text
    return config, text


def _read_lines(path: Path, notes: list[str]) -> list[Record]:
    """The objects of a JSON Lines file. A process killed while writing leaves a torn line: left out, and told."""
    if not path.is_file():
        return []
    records: list[Record] = []
    torn: list[int] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                torn.append(number)
    if torn:
        where = f"line {torn[0]}" if len(torn) == 1 else f"{len(torn)} lines (the first is line {torn[0]})"
        notes.append(f"{path.name}: {where} could not be read and is left out; a line is torn when a run is killed.")
    return records


def _read_tokens(path: Path, notes: list[str]) -> list[Record]:
    """The rows of ``tokens.jsonl`` that have a text and a divergence for every token."""
    found = _read_lines(path, notes)
    whole = [row for row in found if _is_by_token(row)]
    if len(whole) < len(found):
        notes.append(f"{path.name}: {len(found) - len(whole)} rows are not as a run writes them and are left out.")
    return whole


def _is_by_token(row: Record) -> bool:
    texts, values = row.get("tokens"), row.get("divergence")
    if not isinstance(texts, list) or not isinstance(values, list) or not 0 < len(texts) == len(values):
        return False
    numbers = all(value is None or number_in({"": value}, "") is not None for value in values)
    return numbers and all(isinstance(text, str) for text in texts)


def _rate(speed: Record) -> float | None:
    tokens, seconds = number_in(speed, "tokens"), number_in(speed, "seconds")
    return tokens / seconds if tokens and seconds and seconds > 0 else None


def _has_step(record: Record) -> bool:
    step = record.get("step")
    return isinstance(step, int) and not isinstance(step, bool)


def _by_step(records: list[Record]) -> list[Record]:
    """In order, each step once. A run killed after its last checkpoint repeats steps when resumed: the last counts."""
    last = {record["step"]: record for record in records if _has_step(record)}
    return [last[step] for step in sorted(last)]


def _read_scores(paths: Sequence[Path], notes: list[str]) -> list[Scores]:
    found: list[Scores] = []
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            notes.append(f"eval/{path.name} could not be read and is left out ({error}).")
            continue
        scores = dict(_scores_in(record)) if isinstance(record, dict) else {}
        if not scores:
            notes.append(f"eval/{path.name} holds no scores and is left out.")
            continue
        rows, seeds = number_in(record, "num_rows"), record.get("seeds")
        found.append(
            Scores(
                system=str(record.get("system") or path.stem),
                data=str(record.get("data") or path.stem),
                scores=scores,
                num_rows=None if rows is None else int(rows),
                seeds=[seed for seed in seeds if isinstance(seed, int)] if isinstance(seeds, list) else [],
                decoding=mapping(record, "decoding"),
                path=path,
                speed=_rate(mapping(record, "speed")),
            )
        )
    # What was before comes first, the distilled student and its teacher last.
    ranks = {"before": 0, "student": 2, "teacher": 3}
    return sorted(found, key=lambda scores: (scores.data, ranks.get(scores.system, 1), scores.system))


def _scores_in(record: Record) -> Iterator[tuple[str, Score]]:
    for name, entry in mapping(record, "scores").items():
        mean = number_in(entry, "mean") if isinstance(entry, dict) else None
        if mean is not None:
            per_seed = entry.get("per_seed")
            yield name, Score(mean, number_in(entry, "std"), len(per_seed) if isinstance(per_seed, list) else 1)


def _missing(run: RunFolder) -> Iterator[str]:
    if run.stopped is not None:
        how = "was interrupted" if run.stopped["event"] == "interrupted" else "failed"
        yield f"The run {how} at step {run.stopped['step']} and has not been resumed: {run.stopped.get('message', '')}"
    elif not run.has_student and not run.going_on:
        yield "There is no student folder: the run was stopped before its end."
    if not run.steps:
        yield "No training step is recorded (metrics.jsonl), so there are no training curves."
    if not run.validations:
        yield "No validation is recorded, so there are no validation curves."
    if not run.scores:
        yield "No evaluation is recorded (eval/): `distillm eval` writes one."
    if not run.samples:
        yield "No sample is recorded (samples.jsonl), so there are no texts to compare."
