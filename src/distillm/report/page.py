"""The report: one HTML file that needs nothing but itself."""

import base64
import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ..writing import write_anew
from . import heat
from .charts import (
    Figure,
    Table,
    as_json,
    origin_table,
    overlay,
    run_charts,
    step_table,
    time_table,
    validation_table,
)
from .compare import rows_together
from .differences import with_differences
from .formats import legend, table_cells
from .read import RunFolder, Scores, read_runs
from .samples import Sample, cut, samples, within
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
    status,
    title,
    verdict,
)

MAX_BYTES = 5_000_000
SHOWN_SAMPLES = 12
MAX_EVENTS = 200
MAX_CONFIG = 40_000
SAMPLE_BYTES = 1_000_000
TOKEN_BYTES = 900_000


@dataclass(frozen=True)
class Section:
    """All that the page says of one run."""

    id: str
    run: RunFolder
    title: str
    status: str | None
    verdict: list[tuple[str, str]]
    facts: list[tuple[str, str]]
    figures: list[Figure]
    tables: list[Table]
    time: list[tuple[str, str, str, float]]
    scores: Table | None
    decoding: list[str]
    heat: list[heat.Answer]
    num_heat: int
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
    write_anew(output, text)
    return output


def render(runs: Sequence[RunFolder]) -> str:
    """The page as text, which depends on nothing but ``runs`` and the files of scores that they name.

    Where it comes out too large, it is made again with thinner curves and fewer samples.
    """
    compared = _compared(runs) if len(runs) > 1 else None
    share = 1.0 / len(runs)
    text = _render(runs, compared, share)
    while len(text.encode()) >= MAX_BYTES and share > 1e-3:
        share /= 2
        text = _render(runs, compared, share)
    return text


def _render(runs: Sequence[RunFolder], compared: tuple[Table, list[str]] | None, share: float) -> str:
    sections = [_section(run, f"run-{index + 1}", share) for index, run in enumerate(runs)]
    together = overlay(runs, max(20, int(1200 * share))) if compared else []
    charts = [chart for figure in (*together, *(f for section in sections for f in section.figures))
              for chart in figure.charts]  # fmt: skip
    script = asset("page.js")
    plotly, plotly_hash = _plotly()
    text = _template().render(
        title=f"{len(runs)} runs compared" if compared else sections[0].title,
        sections=sections,
        several=compared is not None,
        overlay=together,
        runs_table=_runs_table(runs),
        systems_table=compared[0] if compared else None,
        compared=compared[1] if compared else [],
        shown=SHOWN_SAMPLES,
        max_events=MAX_EVENTS,
        scale=heat.scale(),
        searchable=any(section.heat or section.samples for section in sections),
        has_charts=bool(charts),
        # The policy lets exactly these two scripts run: text that came with the data cannot, whatever it holds.
        script_hashes=f"'{_sha256(script)}' '{plotly_hash}'" if charts else f"'{_sha256(script)}'",
        style=Markup(asset("style.css")),
        script=Markup(script),
        plotly=Markup(plotly) if charts else "",
        charts_json=Markup(as_json(charts)),
    )
    # A lone surrogate, which JSON and YAML may hold, cannot be written as UTF-8.
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _compared(runs: Sequence[RunFolder]) -> tuple[Table, list[str]]:
    """Every system that was scored, runs that differ in their seed alone in one row, and what there is to say of it.

    What can be tested is tested against the first run's student.
    """
    rows, notes = rows_together(runs), list[str]()
    if any(row.run == rows[0].run and row.data is not None for row in rows):
        try:
            rows, notes = with_differences(rows, rows[0].run)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # of a run that is being scored
            notes = [f"The systems were not tested against {rows[0].run}: their files cannot be read ({error})."]
    header, body = table_cells(rows)
    caption = "Mean ± standard deviation over decoding seeds." if not any(row.runs > 1 for row in rows) else ""
    return Table(caption, header, body), [*legend(rows), *notes]


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
    tables = [validation_table(run, max_rows), step_table(run, max_rows), origin_table(run)]
    charts, answered = run_charts(run, section_id, max(20, int(1200 * share))), samples(run)
    return Section(
        id=section_id,
        run=run,
        title=title(run),
        status=status(run),
        verdict=verdict(run),
        facts=facts(run),
        figures=[Figure(f"{section_id}-training", "Through training", charts)] if charts else [],
        tables=[table for table in tables if table is not None],
        time=time_table(run),
        scores=_scores_table(run.scores),
        decoding=decoding(run.scores),
        heat=heat.answers(run, int(TOKEN_BYTES * share)),
        num_heat=len(run.tokens),
        samples=within(answered, int(SAMPLE_BYTES * share)),
        num_samples=len(answered),
        events=[(event["step"], str(event.get("event", "")), str(event.get("message") or "")) for event in run.events],
        command=command(run),
        config=cut(run.config_text, max(2000, int(MAX_CONFIG * min(1.0, 8 * share)))),
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


def asset(name: str) -> str:
    """The text of a file of this package."""
    return (files("distillm.report") / name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
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
