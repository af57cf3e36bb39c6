"""What is drawn: plain series of numbers, thinned for the page; colours and axes are the page's affair."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .read import Record, RunFolder, mapping, number_in
from .text import number, score_name

ORIGINS = ("dataset", "generated", "replayed")
MAX_BINS = 40

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line or one layer of bars. ``look`` is a role that the page turns into colours: it knows both themes."""

    name: str
    look: str
    x: list[float]
    y: list[float | None]
    width: list[float] | None = None


@dataclass(frozen=True)
class Chart:
    """A titled drawing with a sentence that says the same to those who do not see it."""

    id: str
    title: str
    summary: str
    y_title: str
    series: list[Series]
    kind: str = "line"
    y_range: tuple[float, float] | None = None
    marks: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    x_title: str = "step"


@dataclass(frozen=True)
class Figure:
    """Charts over one another on one x axis. ``legend``: names and looks that all of them share, told once beside."""

    id: str
    title: str
    charts: list[Chart]
    legend: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


@dataclass(frozen=True)
class Table:
    """Numbers as text, the header apart; ``caption`` says which rows are shown."""

    caption: str
    header: list[str]
    rows: list[list[str]]


def run_charts(run: RunFolder, prefix: str, max_points: int) -> list[Chart]:
    """The charts that the numbers of ``run`` allow; ``prefix`` makes their ids unique on the page."""
    made = [
        _loss(run, f"{prefix}-loss", max_points),
        _terms(run, f"{prefix}-terms", max_points),
        _validation(run, f"{prefix}-validation", max_points),
        _rouge(run, f"{prefix}-rouge", max_points),
        _probability(run, f"{prefix}-probability", max_points),
        _buffer(run, f"{prefix}-buffer", max_points),
        _age(run, f"{prefix}-age", max_points),
        _origins(run, f"{prefix}-origins"),
    ]
    kept = [chart for chart in made if chart is not None]
    return [replace(chart, summary=chart.summary[:1].upper() + chart.summary[1:]) for chart in kept]


def overlay(runs: Sequence[RunFolder], max_points: int) -> list[Figure]:
    """Several runs over one another as validated, and their students' quality against training time and size."""
    legend = [(run.name, f"run-{index}") for index, run in enumerate(runs)]
    curves: list[Chart] = []
    for key, title, unit in (
        ("divergence", "Validation divergence to the teacher", "nats/token"),
        ("cross_entropy", "Validation cross-entropy", "nats/token"),
        ("rouge_l", "Validation ROUGE-L", "ROUGE-L"),
    ):
        found = [(run.name, _points(run.validations, key)) for run in runs]
        series = [
            _line(name, f"run-{index}", points, max_points) for index, (name, points) in enumerate(found) if points
        ]
        if series:
            curves.append(Chart(f"all-{key}", title, _story(found), unit, series))
    time = _against(runs, "time", "training time (s)", lambda run: run.seconds)
    size = _against(runs, "size", "parameters of the student", lambda run: run.parameters("student"))
    made = [
        Figure("all-curves", "Validation through training", curves, legend),
        Figure("all-time", "Quality against training time", time, legend),
        Figure("all-size", "Quality against size", size, legend),
    ]
    return [figure for figure in made if figure.charts]


def _against(
    runs: Sequence[RunFolder], what: str, x_title: str, measure: Callable[[RunFolder], float | None]
) -> list[Chart]:
    """A chart of each score of the students, on the first data set that has it, where two runs have a point in it."""
    charts: list[Chart] = []
    for name in ("rouge_l", "divergence"):
        sets = [
            entry.data for run in runs for entry in run.scores if entry.system == "student" and name in entry.scores
        ]
        found = [(run, measure(run), _score(run, sets[0], name)) for run in runs] if sets else []
        points = [(index, run.name, x, y) for index, (run, x, y) in enumerate(found) if x is not None and y is not None]
        if len(points) < 2:
            continue
        series = [
            Series(label, f"run-{index}", [float(f"{x:.6g}")], [float(f"{y:.6g}")]) for index, label, x, y in points
        ]
        title = f"{score_name(name).partition(' (')[0]} on {sets[0]}"
        told = "; ".join(f"{label} {number(y)} at {number(x)}" for _, label, x, y in points[:6])
        told += f"; and {len(points) - 6} more" if len(points) > 6 else ""
        unit = "nats/token" if name == "divergence" else "ROUGE-L"
        chart = Chart(f"all-{what}-{name}", title, f"{told}.", unit, series, kind="scatter", x_title=x_title)
        charts.append(chart)
    return charts


def _score(run: RunFolder, data: str, name: str) -> float | None:
    found = [entry.scores[name].mean for entry in run.scores
             if (entry.system, entry.data) == ("student", data) and name in entry.scores]  # fmt: skip
    return found[0] if found else None


def step_table(run: RunFolder, max_rows: int) -> Table | None:
    """The training steps as recorded, evenly thinned to ``max_rows``."""
    if not run.steps:
        return None
    rows = _evenly(run.steps, max_rows)
    terms = list(dict.fromkeys(name for step in run.steps for name in mapping(step, "terms")))
    plain = [
        ("loss", "Loss"), ("batch", "Batch"), ("probability", "Probability"), ("replay_ratio", "Replay ratio"),
        ("buffer", "Buffer"), ("buffer_age", "Buffer age"), ("truncated", "Cut by length"), ("tokens", "Tokens"),
        ("lr", "Learning rate"), ("grad_norm", "Gradient norm"), ("seconds", "Seconds"),
    ]  # fmt: skip
    kept = [(key, label) for key, label in plain if any(step.get(key) is not None for step in run.steps)]
    header = ["Step", *(label for _, label in kept), *(f"Term {name}" for name in terms)]
    body = [
        [str(step["step"]), *(_cell(step, key) for key, _ in kept)]
        + [number(number_in(mapping(step, "terms"), name)) for name in terms]
        for step in rows
    ]
    return Table(_caption("training steps", len(rows), len(run.steps)), header, body)


def validation_table(run: RunFolder, max_rows: int) -> Table | None:
    """The validations as recorded, evenly thinned to ``max_rows``."""
    if not run.validations:
        return None
    rows = _evenly(run.validations, max_rows)
    plain = [
        ("cross_entropy", "Cross-entropy (nats/token)"), ("divergence", "Divergence (nats/token)"),
        ("rouge_l", "ROUGE-L"), ("monitored", "Monitored"),
    ]  # fmt: skip
    kept = [(key, label) for key, label in plain if any(number_in(row, key) is not None for row in run.validations)]
    body = [[str(row["step"]), *(_cell(row, key) for key, _ in kept)] for row in rows]
    caption = _caption("validations", len(rows), len(run.validations))
    return Table(caption, ["Step", *(label for _, label in kept)], body)


def origin_table(run: RunFolder) -> Table | None:
    """Batches by origin in each stretch of steps, as drawn."""
    names, bins = _bins(run)
    if not names:
        return None
    rows = [
        [f"{first}–{last}" if last > first else str(first), *(str(counts[name]) for name in names)]
        for first, last, counts in bins
    ]
    return Table("Batches by origin in each stretch of steps.", ["Steps", *names], rows)


def time_table(run: RunFolder) -> list[tuple[str, str, str, float]]:
    """Part, seconds, share in words, and share of 100, of the whole run's time, without what took none."""
    parts = {name: seconds for name, seconds in run.parts.items() if seconds >= 0.05}
    total = math.fsum(parts.values())
    return [
        (name, f"{seconds:.1f}", f"{seconds / total:.1%}", round(100 * seconds / total, 1))
        for name, seconds in parts.items()
    ]


def as_json(charts: Sequence[Chart]) -> str:
    """The charts as JSON that is inert inside a script element: no ``<``, ``>`` or ``&`` is left."""
    text = json.dumps([asdict(chart) for chart in charts], allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _loss(run: RunFolder, chart_id: str, max_points: int) -> Chart | None:
    points = _points(run.steps, "loss")
    if not points:
        return None
    smooth, window = _smooth(points)
    series = [_line("each step", "faint", points, max_points)]
    if window > 1:
        series.append(_line(f"mean of the last {window} steps", "accent", smooth, max_points))
    else:
        series = [_line("each step", "accent", points, max_points)]
    if len(points) <= max_points:
        series[0] = _broken(series[0], [step["step"] for step in run.steps if number_in(step, "loss") is None])
    return Chart(chart_id, "Training loss", _story([("loss", smooth)]), "loss", series)


def _terms(run: RunFolder, chart_id: str, max_points: int) -> Chart | None:
    records = [{"step": step["step"], **mapping(step, "terms")} for step in run.steps]
    names = list(dict.fromkeys(name for record in records for name in record if name != "step"))
    curves = [(name, _smooth(points)[0]) for name in names if (points := _points(records, name))]
    # A single term is the loss itself, which has a chart already.
    if len(curves) < 2:
        return None
    looks = ("accent", "ink", "dashed", "dotted")
    series = [_line(name, looks[index % 4], points, max_points) for index, (name, points) in enumerate(curves)]
    return Chart(chart_id, "Terms of the loss, smoothed", _story(curves), "loss", series)


def _validation(run: RunFolder, chart_id: str, max_points: int) -> Chart | None:
    named = (("divergence", "divergence to the teacher", "accent"), ("cross_entropy", "cross-entropy", "ink"))
    curves = [(label, look, points) for key, label, look in named if (points := _points(run.validations, key))]
    if not curves:
        return None
    series = [_line(label, look, points, max_points) for label, look, points in curves]
    best = [event["step"] for event in run.events if event.get("event") == "best"]
    marks = [(float(best[-1]), "best")] if best else []
    story = _story([(label, points) for label, _, points in curves])
    if best:
        story += f" The best checkpoint is that of step {best[-1]}."
    return Chart(chart_id, "Validation", story, "nats/token", series, marks=marks)


def _rouge(run: RunFolder, chart_id: str, max_points: int) -> Chart | None:
    points = _points(run.validations, "rouge_l")
    if not points:
        return None
    return Chart(
        chart_id, "Validation ROUGE-L", _story([("ROUGE-L", points)]), "ROUGE-L",
        [_line("ROUGE-L", "accent", points, max_points)],
    )  # fmt: skip


def _probability(run: RunFolder, chart_id: str, max_points: int) -> Chart | None:
    named = (("probability", "student-generation probability", "accent"), ("replay_ratio", "replay ratio", "ink"))
    curves = [(label, look, points) for key, label, look in named if (points := _points(run.steps, key))]
    if not curves:
        return None
    series = [_line(label, look, points, max_points) for label, look, points in curves]
    story = _story([(label, points) for label, _, points in curves])
    return Chart(chart_id, "Use of the student's own responses", story, "probability", series, y_range=(0.0, 1.02))


def _buffer(run: RunFolder, chart_id: str, max_points: int) -> Chart | None:
    points = _points(run.steps, "buffer")
    if not points:
        return None
    series = [_line("responses in the buffer", "accent", points, max_points)]
    return Chart(chart_id, "Replay buffer", _story([("responses in it", points)]), "responses", series)


def _age(run: RunFolder, chart_id: str, max_points: int) -> Chart | None:
    points = _points(run.steps, "buffer_age")
    if not points:
        return None
    series = [_line("mean age", "accent", points, max_points)]
    return Chart(chart_id, "Age of the buffered responses", _story([("mean age in steps", points)]), "steps", series)


def _origins(run: RunFolder, chart_id: str) -> Chart | None:
    names, bins = _bins(run)
    if not names:
        return None
    series = [
        Series(
            name, f"origin-{name if name in ORIGINS else 'other'}",
            x=[(first + last) / 2 for first, last, _ in bins],
            y=[counts[name] / counts.total() for _, _, counts in bins],
            width=[float(last - first + 1) for first, last, _ in bins],
        )
        for name in names
    ]  # fmt: skip
    totals: Counter[str] = Counter()
    for _, _, counts in bins:
        totals.update(counts)
    story = "Of all batches: " + ", ".join(f"{totals[name]} {name}" for name in names) + "."
    return Chart(chart_id, "Origin of the batches", story, "share of batches", series, kind="bar", y_range=(0.0, 1.0))


def _bins(run: RunFolder) -> tuple[list[str], list[tuple[int, int, Counter[str]]]]:
    """Origins in their usual order, and their counts in at most ``MAX_BINS`` equal stretches of recorded steps."""
    batches = [(step["step"], str(step["batch"])) for step in run.steps if isinstance(step.get("batch"), str)]
    size = max(1, math.ceil(len(batches) / MAX_BINS))
    found = {name for _, name in batches}
    names = [name for name in ORIGINS if name in found] + sorted(found.difference(ORIGINS))
    chunks = [batches[start : start + size] for start in range(0, len(batches), size)]
    return names, [(chunk[0][0], chunk[-1][0], Counter(name for _, name in chunk)) for chunk in chunks]


def _points(records: Sequence[Record], key: str) -> Points:
    return [(record["step"], value) for record in records if (value := number_in(record, key)) is not None]


def _line(name: str, look: str, points: Points, max_points: int) -> Series:
    thin = _thin(points, max_points)
    return Series(name, look, [x for x, _ in thin], [float(f"{y:.6g}") for _, y in thin])


def _broken(series: Series, missing: Sequence[float]) -> Series:
    """``series`` with a gap at each of ``missing`` within it: nothing is drawn where nothing was measured."""
    gaps = [(x, None) for x in missing if series.x[0] < x < series.x[-1]]
    points = sorted([*zip(series.x, series.y, strict=True), *gaps], key=lambda point: point[0])
    return replace(series, x=[x for x, _ in points], y=[y for _, y in points])


def _thin(points: Points, max_points: int) -> Points:
    """About ``max_points``: the ends, and the lowest and highest of each stretch, so that no spike is lost."""
    if len(points) <= max_points:
        return points
    size = math.ceil(2 * len(points) / max_points)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[index] for index in sorted(kept)]


def _smooth(points: Points) -> tuple[Points, int]:
    """The mean of the last ``window`` points (fewer at the start), and the window: a twentieth of them, at least 5."""
    if len(points) < 10:
        return points, 1
    window = max(5, len(points) // 20)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    return [
        (x, (sums[index + 1] - sums[max(0, index + 1 - window)]) / min(window, index + 1))
        for index, (x, _) in enumerate(points)
    ], window


def _story(curves: Sequence[tuple[str, Points]], most: int = 6) -> str:
    parts = [
        f"{name} {'from ' if len(points) > 1 else ''}{number(points[0][1])} at step {points[0][0]}"
        + (f" to {number(points[-1][1])} at step {points[-1][0]}" if len(points) > 1 else "")
        for name, points in curves
        if points
    ]
    parts[most:] = [f"and {len(parts) - most} more"] if len(parts) > most else []
    return "; ".join(parts) + "."


def _evenly(records: list[Record], most: int) -> list[Record]:
    if len(records) <= most:
        return records
    return [records[round(index * (len(records) - 1) / (most - 1))] for index in range(most)]


def _caption(what: str, shown: int, total: int) -> str:
    return (
        f"All {total} {what}."
        if shown == total
        else f"{shown} of {total} {what}, evenly spaced; metrics.jsonl has all."
    )


def _cell(record: Record, key: str) -> str:
    value: Any = record.get(key)
    return value if isinstance(value, str) else number(number_in(record, key))
