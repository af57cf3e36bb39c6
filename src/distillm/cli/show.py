"""The commands that show what there is: ``compare``, ``report``, ``analyse``."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..writing import write_anew
from .common import show_comparison


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN|FILE...", help="Run folders, or files of scores.")],
    baseline: Annotated[
        str | None,
        typer.Option(help="Test all against a run, RUN:SYSTEM, or a system of each one's own run (before, teacher)."),
    ] = None,
    each: Annotated[bool, typer.Option("--each", help="A row for every run, whatever they differ in.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the table (.md, .csv, .tex or .json).")
    ] = None,
) -> None:
    """Print a table over runs: scores with their spread, divergence, steps and time.

    \b
    distillm compare runs/kd runs/distillm
    distillm compare runs/grid/*/ --baseline kd -o table.tex
    distillm compare a/scores.json b/scores.json --baseline a/scores

    Runs that differ in nothing but their seed share a row: mean ± standard deviation over them. With --baseline a sign
    says where a paired bootstrap finds a difference; the intervals are in .csv and .json. See docs/evaluation.md.
    """
    from ..report import FORMATS, compare_table, with_differences

    if output is not None and output.suffix not in FORMATS:
        raise ConfigError(f"{output}: the ending says the format; write .md or .csv, .tex or .json")
    rows, notes = compare_table(runs, grouped=not each), list[str]()
    if baseline is not None:
        rows, notes = with_differences(rows, baseline)
    show_comparison(rows)
    for note in notes:
        typer.echo(note, err=True)
    if output is not None:
        write_anew(output, FORMATS[output.suffix](rows))


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The HTML file.")] = None,
) -> None:
    """Write one self-contained HTML page over one or more runs."""
    from ..report import write_report

    target = output or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    typer.echo(write_report(runs, target))


def analyse(
    source: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run folder; none for synthetic ones.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the numbers and plots go.")] = Path("analysis"),
    seed: Annotated[int, typer.Option(help="Of the synthetic distributions.")] = 0,
    batches: Annotated[int, typer.Option(min=2, help="Batches of a run whose gradients are taken.")] = 16,
) -> None:
    """The theory, computed: gradient coefficients, errors of estimators, variance of gradients, against the skew.

    As figure 3 of DistiLLM, from synthetic distributions or, at its checkpoints, from a run's own models and rows.
    """
    from ..analyse import analyse_run, analyse_synthetic, write_analysis
    from ..display import Display

    found = analyse_synthetic(seed=seed) if source is None else analyse_run(source, Display(), batches=batches)
    typer.echo("\n".join(str(path) for path in write_analysis(found, output)))
