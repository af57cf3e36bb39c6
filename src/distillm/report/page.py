"""The report: one HTML file that needs nothing but itself."""

import base64
import gzip
import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from ..errors import StorageError
from .charts import (
    Chart,
    Table,
    as_json,
    origin_table,
    overlay_charts,
    run_charts,
    step_table,
    time_table,
    validation_table,
)
from .compare import rows_of
from .formats import table_cells
from .read import Record, RunFolder, Scores, read_runs
from .text import (
    SYSTEM_NAMES,
    command,
    decoding,
    duration,
    facts,
    mean_std,
    method_name,
    number,
    parameter_count,
    score_name,
    title,
    verdict,
)

MAX_BYTES = 5_000_000
SHOWN_SAMPLES = 12
MAX_TEXT = 1500
MAX_EVENTS = 200
MAX_CONFIG = 40_000
SAMPLE_BYTES = 1_200_000


@dataclass(frozen=True)
class Sample:
    """One prompt and the answers to it, each with its label."""

    id: str
    prompt: str
    answers: list[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """All that the page says of one run."""

    id: str
    run: RunFolder
    title: str
    verdict: str | None
    facts: list[tuple[str, str]]
    charts: list[Chart]
    tables: list[Table]
    scores: Table | None
    decoding: list[str]
    samples: list[Sample]
    num_samples: int
    events: list[tuple[int, str, str]]
    command: str | None
    config: str


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Write the report on ``runs`` to the HTML file ``output`` and return its path.

    Nothing in the file asks for anything outside it, and it stays under 5 MB: long curves and many samples are
    thinned, and the page says so. ``DataError`` where a folder is no run, ``StorageError`` where the file cannot be
    written.
    """
    text = render(read_runs(runs))
    aside = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, output)
    except OSError as error:
        with suppress(OSError):  # its folder may be what is wrong
            aside.unlink()
        raise StorageError(f"the report could not be written to {output}: {error.strerror or error}") from error
    return output


def render(runs: Sequence[RunFolder]) -> str:
    """The page as text. Where it comes out too large, it is made again with thinner curves and fewer samples."""
    share = 1.0 / len(runs)
    text = _render(runs, share)
    while len(text.encode()) >= MAX_BYTES and share > 1e-3:
        share /= 2
        text = _render(runs, share)
    return text


def _render(runs: Sequence[RunFolder], share: float) -> str:
    sections = [_section(run, f"run-{index + 1}", share) for index, run in enumerate(runs)]
    several = len(runs) > 1
    overlay = overlay_charts(runs, max(20, int(1200 * share))) if several else []
    header, body = table_cells([row for run in runs for row in rows_of(run)])
    script = _asset("page.js")
    plotly, plotly_hash = _plotly()
    charts = [*overlay, *(chart for section in sections for chart in section.charts)]
    text = _template().render(
        title=f"{len(runs)} runs compared" if several else sections[0].title,
        sections=sections,
        several=several,
        overlay=overlay,
        runs_table=_runs_table(runs),
        systems_table=Table("Mean ± standard deviation over decoding seeds.", header, body),
        shown=SHOWN_SAMPLES,
        max_events=MAX_EVENTS,
        has_charts=bool(charts),
        # The policy lets exactly these two scripts run: text that came with the data cannot, whatever it holds.
        script_hashes=f"'{_sha256(script)}' '{plotly_hash}'" if charts else f"'{_sha256(script)}'",
        style=Markup(_asset("style.css")),
        script=Markup(script),
        plotly=Markup(plotly) if charts else "",
        charts_json=Markup(as_json(charts)),
    )
    # A lone surrogate, which JSON and YAML may hold, cannot be written as UTF-8.
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _runs_table(runs: Sequence[RunFolder]) -> Table:
    """One row for each run: what it is, how good its student is, what it cost."""
    students = [{entry.data: entry.scores for entry in run.scores if entry.system == "student"} for run in runs]
    columns = list(dict.fromkeys(
        (data, name) for scored in students for data, scores in scored.items()
        for name in ("rouge_l", "divergence") if name in scores
    ))  # fmt: skip
    header = ["Run", "Method", "Student", *(f"{score_name(name)}, {data}" for data, name in columns)]
    header += ["Best validation divergence", "Steps", "Time"]
    rows = [
        [
            run.name,
            method_name(run) or "–",
            parameter_count(run.parameters("student")),
            *(mean_std(name, scored.get(data, {}).get(name)) for data, name in columns),
            number(run.best_validation("divergence")),
            "–" if run.last_step is None else str(run.last_step),
            duration(run.seconds),
        ]
        for run, scored in zip(runs, students, strict=True)
    ]
    return Table("Scores are those of each run's student.", header, rows)


def _section(run: RunFolder, section_id: str, share: float) -> Section:
    max_rows = max(12, int(200 * share))
    tables = [validation_table(run, max_rows), step_table(run, max_rows), origin_table(run), time_table(run)]
    samples = _samples(run)
    return Section(
        id=section_id,
        run=run,
        title=title(run),
        verdict=verdict(run),
        facts=facts(run),
        charts=run_charts(run, section_id, max(20, int(1200 * share))),
        tables=[table for table in tables if table is not None],
        scores=_scores_table(run.scores),
        decoding=decoding(run.scores),
        samples=_within(samples, int(SAMPLE_BYTES * share)),
        num_samples=len(samples),
        events=[(event["step"], str(event.get("event", "")), str(event.get("message") or "")) for event in run.events],
        command=command(run),
        config=_cut(run.config_text, max(2000, int(MAX_CONFIG * min(1.0, 8 * share)))),
    )


def _scores_table(scores: list[Scores]) -> Table | None:
    if not scores:
        return None
    columns = list(dict.fromkeys(name for entry in scores for name in entry.scores))
    header = ["Data", "System", *map(score_name, columns), "Rows", "Seeds"]
    rows = [
        [
            entry.data,
            SYSTEM_NAMES.get(entry.system, entry.system),
            *(mean_std(name, entry.scores.get(name)) for name in columns),
            "–" if entry.num_rows is None else str(entry.num_rows),
            str(max(score.num_seeds for score in entry.scores.values())),
        ]
        for entry in scores
    ]
    return Table("Mean ± standard deviation over decoding seeds; the mean alone where there is one seed.", header, rows)


def _samples(run: RunFolder) -> list[Sample]:
    """Each prompt once: the teacher (or, without one, the reference), the student's first and its last answer."""
    by_id: dict[str, dict[int, Record]] = {}
    for row in run.samples:
        by_id.setdefault(str(row["id"]), {})[row["step"]] = row
    samples: list[Sample] = []
    for row_id, rows in by_id.items():
        first, last = rows[min(rows)], rows[max(rows)]
        known = "Teacher" if isinstance(last.get("teacher"), str) else "Reference"
        answers = [(known, last.get(known.lower())), (_stage(min(rows)), first.get("student"))]
        if len(rows) > 1:
            answers.append((_stage(max(rows)), last.get("student")))
        kept = [(label, _cut(text, MAX_TEXT)) for label, text in answers if isinstance(text, str)]
        samples.append(Sample(_cut(row_id, 80), _cut(str(last.get("prompt", "")), MAX_TEXT), kept))
    return samples


def _stage(step: int) -> str:
    return "Student before training" if step == 0 else f"Student at step {step}"


def _within(samples: list[Sample], budget: int) -> list[Sample]:
    """As many of the first samples as fit in ``budget`` bytes of HTML."""
    kept: list[Sample] = []
    for sample in samples:
        texts = [sample.prompt, *(text for _, text in sample.answers)]
        budget -= 200 + sum(100 + len(escape(text).encode(errors="replace")) for text in texts)
        if budget < 0:
            break
        kept.append(sample)
    return kept


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most} more characters)"


def _asset(name: str) -> str:
    return (files("distillm.report") / name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


@cache
def _plotly() -> tuple[str, str]:
    """plotly.js, compressed and in base64, and the hash by which the policy knows it once inflated."""
    script = get_plotlyjs()
    packed = gzip.compress(script.encode(), compresslevel=9, mtime=0)
    return base64.b64encode(packed).decode("ascii"), _sha256(script)


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
