"""The commands that show what there is: ``compare``, ``report``, ``analyse``."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .common import show_comparison, write


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the table (.md or .csv).")] = None,
) -> None:
    """Print a table over runs: scores with their spread, divergence, steps and time."""
    if output is not None and output.suffix not in (".md", ".csv"):
        raise ConfigError(f"{output}: the ending says the format; write .md or .csv")
    show_comparison(runs)
    if output is not None:
        from ..report import as_csv, as_markdown, compare_table

        write(output, (as_csv if output.suffix == ".csv" else as_markdown)(compare_table(runs)))


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
