"""The commands that train: ``train``, ``sweep``, ``demo``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..config import load_run
from ..errors import TrainingError
from ..paths import is_file
from . import complete
from .common import Overrides, RunSource, plain_console, show_comparison


def train(
    source: RunSource,
    overrides: Overrides = None,
) -> None:
    """Distil: train a student, score it, and write the run folder with its report.

    \b
    distillm train run.yaml
    distillm train run.yaml optim.lr=1e-4 method.alpha=0.2 output=runs/second
    distillm train runs/second resume=auto      goes on where an interrupted run stopped
    distillm train run.yaml method.name=gkd     another method on the same data: sft, seqkd, kd, imitkd, gkd,
                                                minillm, distillm or distillm2

    \b
    torchrun --nproc-per-node 4 -m distillm train run.yaml      on four devices; or accelerate launch -m distillm ...

    Every setting, its default and meaning: `distillm schema`. A file to start from: `distillm recipes show NAME`.
    """
    run = load_run(source, overrides or [])
    if is_file(Path(source) / "run.yaml") and not any(o.startswith("output=") for o in overrides or []):
        run = run.model_copy(update={"output": source})
    from ..display import Display
    from ..pipeline import distill
    from ..processes import leave, writes
    from ..report import compare_table

    display = Display()
    folder = distill(run, display, "distillm " + " ".join(sys.argv[1:]))
    if writes() and list((folder / "eval").glob("*.json")):
        show_comparison(compare_table([folder]))
    leave()


def sweep(
    source: Annotated[
        str, typer.Argument(metavar="YAML|RECIPE", help="What the runs share.", autocompletion=complete.sources)
    ],
    overrides: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE[,VALUE]...", help="Settings, with all their values.", autocompletion=complete.settings
        ),
    ],
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process of its own.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which runs there would be.")] = False,
) -> None:
    """Make every combination of settings, and end in one table with mean and spread over seeds, and one report.

    \b
    distillm sweep run.yaml method.name=sft,kd,gkd,distillm seed=1,2,3 output=runs/methods
    distillm sweep run.yaml method.alpha=0,0.01,0.1,0.3 output=runs/alpha --jobs 2

    Each run has a folder in `output`, beside their table and report. Finished runs are not repeated: after an
    interruption the same command goes on.
    """
    from ..sweep import cells_of, run_sweep, write_table

    cells = cells_of(source, overrides)
    if dry_run:
        typer.echo("\n".join(cell.run.output for cell in cells))
        return
    from ..display import Display
    from ..report import write_report

    finished, failed = run_sweep(cells, Display(), jobs)
    folder = Path(cells[0].run.output).parent
    if finished:
        plain_console().print(write_table(finished, folder))
        report = write_report([Path(cell.run.output) for cell in finished], folder / "report.html")
        typer.echo(f"table:  {folder / 'table.md'}\nreport: {report}")
    if failed:
        said = "\n".join(f"  {Path(name).name}: {text.splitlines()[0]}" for name, text in failed.items())
        raise TrainingError(f"{len(failed)} of {len(cells)} runs failed:\n{said}")


def demo(
    output: Annotated[Path, typer.Option(help="Where the runs and the report go.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="At most two minutes: fewer steps, worse students.")] = False,
    teacher: Annotated[str | None, typer.Option(help="Another teacher: a folder or a GGUF file.")] = None,
) -> None:
    """Distil a real pretrained teacher into 8 of its 30 layers, in minutes, and compare with fine-tuning."""
    from ..demo import run_demo
    from ..display import Display

    run_demo(output, Display(), quick=quick, teacher=teacher)
