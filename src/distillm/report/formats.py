"""A table of runs for a terminal or a page, and in Markdown, CSV, LaTeX and JSON."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict

from .compare import Row, score_columns
from .differences import SAMPLES, mark
from .text import duration, mean_std, number, parameter_count, score_name

ABOUT_RUNS = ("Run", "Data", "Method", "Student", "Seeds", "Runs", "Best validation divergence", "Steps", "Time")
"""Columns that are no scores: what is the same in every row may be said once instead."""
TEXTUAL = ("Run", "System", "Data", "Method")
LATEX = {
    **{sign: "\\" + sign for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "–": "--",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
}


def table_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows as rounded text: each score as mean ± std with its mark (an en dash: not known)."""
    columns, repeated = score_columns(rows), any(row.runs > 1 for row in rows)
    header = [*TEXTUAL, "Student", *map(score_name, columns), "Seeds", *(["Runs"] if repeated else [])]
    header += ["Best validation divergence", "Steps", "Time"]
    body = [
        [
            row.run,
            row.system or "–",
            row.data or "–",
            row.method or "–",
            parameter_count(row.student_parameters),
            *(mean_std(name, row.scores.get(name)) + mark(row.differences.get(name)) for name in columns),
            "–" if row.seeds is None else str(row.seeds),
            *([str(row.runs)] if repeated else []),
            number(row.best_divergence),
            number(row.steps),
            duration(row.seconds),
        ]
        for row in rows
    ]
    return header, body


def said_once(header: Sequence[str], body: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]], list[str]]:
    """Header and rows without the columns about runs that are the same in every row, and what those say."""
    same = [name in ABOUT_RUNS and len({row[i] for row in body}) == 1 for i, name in enumerate(header)]
    kept = [[cell for cell, once in zip(line, same, strict=True) if not once] for line in (header, *body)]
    return kept[0], kept[1:], [f"{name}: {body[0][i]}" for i, name in enumerate(header) if same[i]]


def legend(rows: Sequence[Row]) -> list[str]:
    """What the signs in the table mean, a line each; none where there is nothing to explain."""
    lines: list[str] = []
    if any(row.runs > 1 for row in rows):
        lines.append("±: standard deviation over training runs where there are several, else over decoding seeds")
    baselines = list(dict.fromkeys(row.baseline for row in rows if row.baseline))
    if baselines:
        how = f"paired bootstrap over the same rows, {SAMPLES} samples"
        lines.append(f"† p < 0.05, ‡ p < 0.01 against {', '.join(baselines)} ({how})")
    return lines


def as_markdown(rows: Sequence[Row]) -> str:
    """The rounded table in Markdown."""
    header, body = table_cells(rows)
    rule = ["---" if name in TEXTUAL else "---:" for name in header]
    lines = ["| " + " | ".join(map(_markdown_cell, line)) + " |\n" for line in [header, rule, *body]]
    return "".join(lines) + "".join(f"\n{_markdown_cell(line)}\n" for line in legend(rows))


def as_latex(rows: Sequence[Row]) -> str:
    """The rounded table in LaTeX, for the package booktabs; what is the same in every row stands in a comment."""
    header, body, once = said_once(*table_cells(rows))
    columns = "".join("l" if name in TEXTUAL else "r" for name in header)
    cells = [" & ".join(map(_latex_cell, line)) + r" \\" for line in (header, *body)]
    lines = [*(f"% {' '.join(text.split())}" for text in (*once, *legend(rows))), rf"\begin{{tabular}}{{{columns}}}"]
    lines += [r"\toprule", cells[0], r"\midrule", *cells[1:], r"\bottomrule", r"\end{tabular}"]
    return "".join(line + "\n" for line in lines)


def as_csv(rows: Sequence[Row]) -> str:
    """The table in CSV with numbers as they are in the files.

    Three columns for each score: mean, std, and seeds, over which these two are: training runs where there are
    several, else decoding seeds. Four more for a score that was tested: difference, low and high (95 %), p.
    """
    columns, parts, tests = score_columns(rows), ["mean", "std", "seeds"], ["difference", "low", "high", "p"]
    tested = [name for name in columns if any(name in row.differences for row in rows)]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["run", "path", "system", "data", "method", "student_parameters"]
        + [f"{name}_{part}" for name in columns for part in parts]
        + [f"{name}_{part}" for name in tested for part in tests]
        + ["best_validation_divergence", "steps", "seconds", "runs", "baseline"]
    )
    for row in rows:
        cells: list[object] = [row.run, str(row.path), row.system, row.data, row.method, row.student_parameters]
        for name in columns:
            score = row.scores.get(name)
            cells += [score.mean, score.std, score.num_seeds] if score else [None, None, None]
        for name in tested:
            found = row.differences.get(name)
            cells += [found.difference, found.low, found.high, found.p] if found else [None] * 4
        writer.writerow([*cells, row.best_divergence, row.steps, row.seconds, row.runs, row.baseline])
    return text.getvalue()


def as_json(rows: Sequence[Row]) -> str:
    """Every field of every row."""
    return json.dumps([asdict(row) for row in rows], ensure_ascii=False, indent=1, default=str) + "\n"


FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {
    ".md": as_markdown,
    ".csv": as_csv,
    ".tex": as_latex,
    ".json": as_json,
}
"""By the ending of a file."""


def _markdown_cell(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def _latex_cell(text: str) -> str:
    return re.sub(r"[\\&%$#_{}~^<>–±†‡]", lambda sign: LATEX[sign[0]], " ".join(text.split()))
