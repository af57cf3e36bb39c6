"""A grid of runs that differ in a few settings; finished ones are not repeated, and one table ends it."""

import hashlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.table import Table

from .config import Run, as_yaml, changed, make_run, read_yaml
from .display import Display, clock
from .errors import ConfigError, DistillmError, Interrupted, Terminated
from .pipeline import distill, heard
from .project import Stop, build
from .report import read_run
from .report.grid import grid, grid_cells, grid_markdown
from .writing import write_text

_OUTSIDE = re.compile(r""",(?![^\[]*\])(?![^{]*\})""")  # a comma that separates values, not one inside [..] or {..}

_ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@dataclass(frozen=True)
class Cell:
    """One run of the grid: what sets it apart, and the whole of it."""

    settings: dict[str, str]
    run: Run


def cells_of(source: str, overrides: Sequence[str]) -> list[Cell]:
    """The runs of the grid that ``overrides`` span: ``key=a,b`` gives ``key`` two values, ``key=a`` one to all.

    Each run's folder is named after its values, inside the sweep's ``output``. The teacher's responses, where runs
    train on them, are shared.

    Raises:
        ConfigError: a combination is no valid run, or there is nothing to vary.
    """
    choices: list[list[tuple[str, str]]] = []
    for override in overrides:
        key, sign, values = override.partition("=")
        if not sign:
            raise ConfigError(f"{override!r} is not an override; write key.path=value or key.path=value,value")
        choices.append([(key, value) for value in _OUTSIDE.split(values)])
    varied = [key for options in choices if len(options) > 1 for key, _ in options[:1]]
    if not varied:
        raise ConfigError("nothing varies; give a setting several values, such as method.name=sft,kd,distillm seed=1,2")
    found: list[Cell] = []
    for combination in itertools.product(*choices):
        settings = {key: value for key, value in combination if key in varied}
        said = [f"{key}={value}" for key, value in combination]
        run = make_run(read_yaml(source), said, f"{source} {' '.join(said)}")
        folder = Path(run.output)
        changes: dict[str, Any] = {"output": str(folder / _name(settings)), "resume": "auto"}
        if run.teacher_writes and run.data.responses_file is None:
            name = f"responses-{_decoding(run)}.jsonl"
            changes["data"] = run.data.model_copy(update={"responses_file": str(folder / name)})
        found.append(Cell(settings, run.model_copy(update=changes)))
    twice = {cell.run.output for cell in found if sum(other.run.output == cell.run.output for other in found) > 1}
    if twice:
        raise ConfigError(f"two runs would be written to {min(twice)}; give each combination once")
    return found


def _decoding(run: Run) -> str:
    """A short name of all that a file of the teacher's responses belongs to: other responses need another file."""
    drawn = run.seed if run.data.responses_temperature else None
    said = [run.teacher and run.teacher.model_dump(), run.generation.model_dump(exclude={"batch_size"})]
    said += [] if run.data.responses_server is None else [run.data.responses_server.name]
    return hashlib.sha256(repr([*said, run.data.responses_temperature, drawn]).encode()).hexdigest()[:8]


def _name(settings: dict[str, str]) -> str:
    """A folder's name: values, each after the last word of its key unless it names the method."""
    words = [value if key == "method.name" else f"{key.rpartition('.')[2]}-{value}" for key, value in settings.items()]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(words)).strip("-.") or "run"
    # Templates and their like are long; a file's name has 255 bytes at most, with what is put behind it.
    return name if len(name) <= 120 else f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def run_sweep(cells: Sequence[Cell], display: Display, jobs: int = 1) -> tuple[list[Cell], dict[str, str]]:
    """Make the runs of ``cells``, ``jobs`` at a time; those that are finished, and what went wrong with others.

    A run that fails is said and does not stop the others. Interrupted, the same command goes on where it stopped.
    """
    waiting = [cell for cell in cells if not _finished(cell)]
    if len(waiting) < len(cells):
        display.note(f"{len(cells) - len(waiting)} of {len(cells)} runs are finished already")
    if jobs == 1:
        failed = _in_turn(waiting, display)
    else:
        ends = (each for each in _ENDS if signal.getsignal(each) != signal.SIG_IGN)  # as under nohup
        with heard(_stopping(display), *ends):
            failed = _together(waiting, display, jobs)
    return [cell for cell in cells if cell.run.output not in failed], failed


def _finished(cell: Cell) -> bool:
    folder = Path(cell.run.output)
    if not (folder / "report.html").is_file():
        return False
    differences = changed(read_yaml(str(folder)), cell.run)
    if differences:
        raise ConfigError(
            f"{folder} holds a finished run of other settings ({', '.join(differences[:4])}); "
            "give the sweep another output=, or delete that folder"
        )
    return read_run(folder).finished


def _in_turn(waiting: Sequence[Cell], display: Display) -> dict[str, str]:
    failed: dict[str, str] = {}
    began, stop = time.monotonic(), Stop()
    for done, cell in enumerate(waiting):
        if stop.is_set():  # when the run before had nothing left to do
            raise stop.error(f"stopped after {done} of {len(waiting)} runs; the same command goes on")
        left = f", about {clock((time.monotonic() - began) / done * (len(waiting) - done))} left" if done else ""
        display.note(f"\nrun {done + 1} of {len(waiting)}: {Path(cell.run.output).name}{left}")
        try:
            distill(cell.run, display, stop=stop)
        except Exception as error:
            memory = "OutOfMemoryError" in type(error).__name__
            if not memory and (not isinstance(error, DistillmError) or isinstance(error, Interrupted)):
                raise
            failed[cell.run.output] = "out of memory: lower train.micro_batch_size" if memory else str(error)
            display.note(f"error: {failed[cell.run.output]}")
    if stop.is_set():
        raise stop.error("stopped; all runs have ended, and the same command goes on from there")
    return failed


def _together(waiting: Sequence[Cell], display: Display, jobs: int) -> dict[str, str]:
    """Each run in a process of its own, with its share of the processor."""
    failed: dict[str, str] = {}
    writing = {(c.run.data.model_dump_json(), c.run.seed): c for c in waiting if c.run.teacher_writes}
    for cell in writing.values():  # once, before all, so that no two processes write one file
        try:
            build(cell.run.model_copy(update={"output": f"{cell.run.output}.responses"}), display)
        except DistillmError as error:
            failed |= {c.run.output: str(error) for c in waiting if c.run.data == cell.run.data}
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    queue = [cell for cell in waiting if cell.run.output not in failed]
    running = dict[Any, tuple[Cell, Path]]()
    try:
        while queue or running:
            while queue and len(running) < jobs:
                cell = queue.pop(0)
                folder = Path(cell.run.output)
                folder.parent.mkdir(parents=True, exist_ok=True)
                wanted, log = (folder.with_name(f"{folder.name}.{kind}") for kind in ("yaml", "log"))
                write_text(wanted, as_yaml(cell.run))
                with log.open("ab") as file:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "distillm", "train", str(wanted), "resume=auto"],
                        stdout=file,
                        stderr=file,
                        env=os.environ | {"OMP_NUM_THREADS": threads},
                        start_new_session=True,  # a terminal's Ctrl-C would reach it twice, which stops it at once
                    )
                running[process] = cell, log
                display.note(f"began {folder.name} ({log})")
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                cell, log = running.pop(process)
                name = Path(cell.run.output).name
                if process.returncode:
                    failed[cell.run.output] = f"exit code {process.returncode}, see {log}"
                said = failed.get(cell.run.output, "finished")
                display.note(f"{name}: {said}; {len(queue) + len(running)} to go")
    finally:
        for process in running:  # each saves what it has; SIGINT may be ignored, as in the jobs of a script
            process.terminate()
        for process in running:
            process.wait()
    return failed


def _stopping(display: Display) -> Callable[[int, FrameType | None], None]:
    """On a scheduler's signal, or that of a terminal that closes: nobody else would stop the runs.

    It ends the sweep once: a second signal must not keep the others from being stopped.
    """
    stop = Stop()

    def end(by: int, _: FrameType | None) -> None:
        if not stop.is_set():
            stop.set()
            display.note(f"stopped by {signal.Signals(by).name}; the same command goes on")
            raise SystemExit(Terminated.exit_code)  # no Exception, which the code that it meets might take for its own

    return end


def write_table(cells: Sequence[Cell], folder: Path) -> Table:
    """The comparison of finished runs, also as ``table.md`` in ``folder``."""
    found = grid([(cell.settings, Path(cell.run.output)) for cell in cells])
    header, body = grid_cells(found)
    table = Table(*header)
    for row in body:
        table.add_row(*row)
    write_text(folder / "table.md", grid_markdown(found))
    return table
