"""`python -m studies`: run a study, or write the pages from the results that are kept."""

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from distillm.display import Display
from distillm.errors import DistillmError

from . import pages, plan, smoke
from .make import keep, kept_in, make
from .plan import Place

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def run(
    studies: Annotated[list[str] | None, typer.Argument(help="Which studies; all unless given.")] = None,
    smoke_only: Annotated[bool, typer.Option("--smoke", help="Made-up rows, tiny models, two steps.")] = False,
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
) -> None:
    """Make what is missing of the studies. Stopped, the same command goes on where it stopped."""
    display = Display()
    scratch = Path(tempfile.mkdtemp(prefix="studies-")) if smoke_only else None
    failed: dict[str, str] = {}
    try:
        place = Place()
        if scratch is not None:
            place = Place(str(scratch / "rows"), str(scratch / "runs"), smoke=True)
            smoke.write_rows(scratch / "rows")
        for name in studies or plan.names():
            display.note(f"\n{name}")
            failed |= make(plan.read(name), place, display, jobs)
        if scratch is not None:
            pages.write(scratch / "pages", lambda name: kept_in(plan.read(name), place))
    except DistillmError as error:
        display.note(f"error: {error}")
        raise typer.Exit(1) from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch)
    for name, why in failed.items():
        display.note(f"{name}: {why}")
    raise typer.Exit(1 if failed else 0)


@app.command()
def collect() -> None:
    """Keep the results of runs that have ended while others go on."""
    for name in plan.names():
        keep(plan.read(name), Place())


@app.command(name="pages")
def write_pages() -> None:
    """Write docs/studies from the results that are kept."""
    for path in pages.write(Path("docs/studies"), lambda name: kept_in(plan.read(name), Place())):
        Display().note(str(path))


if __name__ == "__main__":
    app()
