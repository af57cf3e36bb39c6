"""A run folder for a notebook: what it recorded as pandas frames, and the report's charts as plotly figures."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from ..errors import ConfigError
from ..notebook import facts_lines, facts_table
from .charts import Chart, Series, overlay, run_charts
from .read import Record, RunFolder, read_runs
from .text import facts, title

POINTS = 2000
"""Most points of a line: the lowest and the highest of each stretch are kept."""
_COLOURS = ("#1f5fa8", "#c2570c", "#3a7d44", "#7a4fa3", "#9a7b0a", "#4b5563")
_DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True, repr=False)
class RunLog:
    """What a run recorded so far. Each frame has a row for each entry, none where the run recorded none.

    ``steps`` and ``validations`` have the step as their index; nested figures have dotted names (``terms.distill``).
    ``events``, ``times`` and ``samples`` are those of ``metrics.jsonl`` and ``samples.jsonl``. ``scores`` has a row for
    each score of each system on each data set: mean over rows, deviation over ``seeds`` decoding seeds. ``config`` is
    ``run.yaml``; ``notes`` say what is missing or could not be read.
    """

    path: Path
    name: str
    config: dict[str, Any]
    steps: pd.DataFrame
    validations: pd.DataFrame
    events: pd.DataFrame
    times: pd.DataFrame
    samples: pd.DataFrame
    scores: pd.DataFrame
    notes: list[str]
    folder: RunFolder = field(compare=False)

    def __repr__(self) -> str:
        return facts_lines(title(self.folder), facts(self.folder))

    def _repr_html_(self) -> str:
        return facts_table(title(self.folder), facts(self.folder))


def read_run(path: str | Path) -> RunLog:
    """Read what the run in the folder ``path`` recorded, whole or so far.

    Raises:
        DataError: ``path`` is no run folder, or may not be read.
    """
    (run,) = read_runs([Path(path)])
    return _log(run)


def plot(runs: str | Path | RunLog | Sequence[str | Path | RunLog], what: str = "loss") -> go.Figure:
    """A chart of the report as a plotly figure, which a notebook shows where it is the last value of a cell.

    ``what`` is a chart of the report: loss, terms, validation, rouge, probability, buffer, age, origins (of one run
    alone); one validation figure: divergence, cross_entropy, rouge_l; or, of several runs that were scored, their
    students' scores against what they cost: time-rouge_l, time-divergence, size-rouge_l, size-divergence. The curves of
    several runs are laid over one another, without the noise of single steps.

    JupyterLab, Notebook 7 and VS Code draw it without a network. For a notebook that is to be exported as HTML, set
    ``plotly.io.renderers.default = "plotly_mimetype+notebook"`` first: plotly.js then goes into the notebook, once.

    Raises:
        ConfigError: there is no such chart, or no numbers for it.
        DataError: one of ``runs`` is no run folder.
    """
    given = [runs] if isinstance(runs, str | Path | RunLog) else list(runs)
    folders = read_runs([run.path if isinstance(run, RunLog) else Path(run) for run in given])
    laid = [chart for figure in overlay(folders, POINTS) for chart in figure.charts]
    overlays = {chart.id.removeprefix("all-"): chart for chart in laid}
    of_each = [{c.id.removeprefix("run-"): c for c in run_charts(run, "run", POINTS)} for run in folders]
    if what in overlays:
        return _figure([("", overlays[what])], several=len(folders) > 1)
    found = [(run.name, charts[what]) for run, charts in zip(folders, of_each, strict=True) if what in charts]
    if not found:
        there = list(dict.fromkeys([*(name for charts in of_each for name in charts), *overlays]))
        raise ConfigError(f"there is nothing to draw of {what!r}; there is {', '.join(there) or 'nothing yet'}")
    if len(folders) > 1 and found[0][1].kind == "bar":
        raise ConfigError(f"{what} is drawn of one run alone: the bars of several would hide one another")
    return _figure(found, several=len(folders) > 1)


def _log(run: RunFolder) -> RunLog:
    scores = [
        {"data": entry.data, "system": entry.system, "score": name, "mean": score.mean, "std": score.std,
         "seeds": score.num_seeds, "rows": entry.num_rows}
        for entry in run.scores for name, score in entry.scores.items()
    ]  # fmt: skip
    return RunLog(
        path=run.path,
        name=run.name,
        config=run.config,
        steps=_frame(run.steps, "step"),
        validations=_frame(run.validations, "step"),
        events=_frame(run.events),
        times=_frame(run.times),
        samples=_frame(run.samples),
        scores=pd.DataFrame(scores, columns=["data", "system", "score", "mean", "std", "seeds", "rows"]),
        notes=run.notes,
        folder=run,
    )


def _frame(records: Sequence[Record], index: str | None = None) -> pd.DataFrame:
    plain = [{key: value for key, value in record.items() if key != "kind"} for record in records]
    frame = pd.json_normalize(plain)
    return frame if index is None or index not in frame else frame.set_index(index)


def _figure(charts: Sequence[tuple[str, Chart]], *, several: bool) -> go.Figure:
    figure = go.Figure()
    first = charts[0][1]
    for number, (run, chart) in enumerate(charts):
        smooth = [series for series in chart.series if series.look != "faint"]
        shown = smooth if several and smooth else chart.series
        for index, series in enumerate(shown):
            colour, dash = (number, index) if several and len(charts) > 1 else (index, 0)
            names = (
                [run, series.name] if several and run and len(shown) > 1 else [run if several and run else series.name]
            )
            figure.add_trace(_trace(series, chart.kind, " · ".join(names), colour, dash))
        for place, text in chart.marks if not several else []:
            figure.add_vline(x=place, line_dash="dot", line_width=1, annotation_text=_plain(text))
    figure.update_layout(
        title=_plain(first.title),
        template="plotly_white",
        height=380,
        margin={"l": 60, "r": 20, "t": 50, "b": 50},
        hovermode="x unified",
        barmode="stack" if first.kind == "bar" else None,
        xaxis_title=_plain(first.x_title),
        yaxis_title=_plain(first.y_title),
        yaxis_range=first.y_range,
    )
    return figure


def _trace(series: Series, kind: str, name: str, colour: int, dash: int) -> Any:
    tint = "#b8c2cc" if series.look == "faint" else _COLOURS[colour % len(_COLOURS)]
    if kind == "bar":
        return go.Bar(name=_plain(name), x=series.x, y=series.y, width=series.width, marker_color=tint)
    line = {"color": tint, "width": 1.25 if series.look == "faint" else 2, "dash": _DASHES[dash % len(_DASHES)]}
    mode = "markers" if kind == "scatter" else "lines+markers" if len(series.x) <= 30 else "lines"
    return go.Scatter(name=_plain(name), x=series.x, y=series.y, mode=mode, line=line)


def _plain(text: str) -> str:
    """``text`` as plotly shows it: it reads a little HTML."""
    return html.escape(text, quote=False)
