"""The figures of the pages, as SVG: the same results give the same file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from .results import Result
from .text import named

mpl.rcParams["svg.hashsalt"] = "distillm"
COLOURS = (
    "#4c566a",
    "#2e7d32",
    "#8d6e63",
    "#00838f",
    "#5e35b1",
    "#c62828",
    "#1565c0",
    "#ef6c00",
    "#ad1457",
    "#9e9d24",
    "#6d4c41",
    "#26a69a",
)
PARTS = ("generation", "teacher", "student forward", "student backward", "loss", "optimizer")
"""Parts of a step that the time page shows; whatever else a run did is told in its own report."""


def curves(groups: Mapping[str, Sequence[Result]], column: int, label: str, path: Path) -> None:
    """A validation figure of each variant, the mean over its seeds, by steps and by minutes."""
    figure, axes = _axes(2)
    for i, (variant, runs) in enumerate(groups.items()):
        points = _mean_curve(runs, column)
        look: dict[str, Any] = {"marker": ".", "color": COLOURS[i % len(COLOURS)], "label": named(variant)}
        look |= {"linestyle": "--"} if i >= len(COLOURS) else {}
        for axis, x in zip(axes, (0, 1), strict=True):
            axis.plot([p[x] for p in points], [p[2] for p in points], **look)
    axes[0].set(xlabel="steps", ylabel=label)
    axes[1].set(xlabel="minutes of training")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize="small", loc="outside right center")
    _save(figure, path)


def _mean_curve(runs: Sequence[Result], column: int) -> list[tuple[float, float, float]]:
    found: list[tuple[float, float, float]] = []
    for points in zip(*(run.curve for run in runs), strict=False):
        values = [point[column] for point in points]
        if None not in values:
            count = len(points)
            found.append((points[0][0], sum(p[1] for p in points) / 60 / count, sum(values) / count))
    return found


def axis_plot(panels: Mapping[str, Mapping[str, tuple[float, float | None]]], xlabel: str, path: Path) -> None:
    """Scores against the values of an axis that has numbers, with the deviation over seeds."""
    figure, axes = _axes(len(panels))
    for axis, (label, rows) in zip(axes, panels.items(), strict=True):
        spread = [deviation or 0.0 for _, deviation in rows.values()]
        places = list(range(len(rows)))
        axis.errorbar(places, [value for value, _ in rows.values()], yerr=spread, marker="o", color=COLOURS[6])
        axis.set_xticks(places, list(rows))
        axis.set(xlabel=xlabel, ylabel=label)
    _save(figure, path)


def times(groups: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Where the seconds of a step go, stacked, for each method."""
    figure, (axis,) = _axes(1, height=0.45 * len(groups) + 1.2)
    left = [0.0] * len(groups)
    for colour, part in zip(COLOURS, PARTS, strict=False):
        widths = [fmean(r.parts.get(part, 0.0) / r.record["steps"] for r in runs) for runs in groups.values()]
        axis.barh([named(v) for v in groups], widths, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set(xlabel="seconds a step")
    figure.legend(fontsize="small", loc="outside right center")
    _save(figure, path)


def gradients(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Size and variance of a batch's gradient over training, by skew."""
    names = list(dict.fromkeys(row["divergence"] for row in rows))
    figure, axes = _axes(len(names), 2)
    for column, name in enumerate(names):
        for row, (key, label) in enumerate((("mean", "mean norm"), ("variance", "variance of the norm"))):
            axis = axes[row * len(names) + column]
            for colour, alpha in zip(COLOURS, dict.fromkeys(r["alpha"] for r in rows), strict=False):
                mine = [r for r in rows if r["divergence"] == name and r["alpha"] == alpha]
                axis.plot(
                    [r["step"] for r in mine], [r[key] for r in mine], marker=".", color=colour, label=f"{alpha:g}"
                )
            axis.set(title=name.replace("_", " "), xlabel="step", ylabel=label, yscale="log")
    axes[0].legend(fontsize="small", title="skew")
    _save(figure, path)


def coefficients(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """What multiplies a token's gradient, by its percentile, at the first weights and at the last."""
    steps = sorted({row["step"] for row in rows})
    shown = dict.fromkeys((steps[0], steps[-1]))
    figure, axes = _axes(len(shown))
    for axis, step in zip(axes, shown, strict=True):
        for colour, name in zip(COLOURS, dict.fromkeys(row["divergence"] for row in rows), strict=False):
            mine = [row for row in rows if row["divergence"] == name and row["step"] == step]
            x, y = [row["percentile"] for row in mine], [row["coefficient"] for row in mine]
            axis.plot(x, y, marker=".", color=colour, label=str(name).replace("_", " "))
        axis.set(title=f"step {step}", xlabel="percentile of tokens", ylabel="coefficient")
        axis.set_yscale("symlog", linthresh=0.1)
    axes[0].legend(fontsize="small")
    _save(figure, path)


def errors(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The normalized error of an estimate, by skew and number of samples."""
    names = list(dict.fromkeys(row["divergence"] for row in rows))
    figure, axes = _axes(len(names))
    for axis, name in zip(axes, names, strict=True):
        for colour, samples in zip(COLOURS, dict.fromkeys(row["samples"] for row in rows), strict=False):
            mine = [row for row in rows if row["divergence"] == name and row["samples"] == samples]
            x, y = [row["alpha"] for row in mine], [row["normalized"] for row in mine]
            axis.plot(x, y, marker=".", color=colour, label=f"{samples} samples")
        axis.set(title=name.replace("_", " "), xlabel="skew", ylabel="squared error / (1 - a)²")
        axis.set(xscale="log", yscale="log")
    axes[0].legend(fontsize="small")
    _save(figure, path)


def _axes(columns: int, rows: int = 1, height: float = 3.4) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(5.2 * columns, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
