"""What a user sees while work goes on: live bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table

from .screen import visible

Advance = Callable[..., None]


class Terminal(Console):
    """A console on which nothing that is shown steers the terminal: not by [brackets], nor by control characters."""

    def __init__(self, *, stderr: bool = False, quiet: bool = False, soft_wrap: bool = False, width: int | None = None):
        super().__init__(stderr=stderr, quiet=quiet, soft_wrap=soft_wrap, width=width, markup=False, highlight=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's; what rich itself writes to steer the terminal is in styles and controls, not in texts."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


class Display:
    """Phases with progress and time left, and notes between them. ``quiet`` shows nothing."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False, interval: float = 10.0):
        self.console = console or Terminal(stderr=True, quiet=quiet, soft_wrap=True)
        self.interval = interval

    def note(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False)

    def table(self, table: Table) -> None:
        """A table that stays."""
        self.console.print(table)

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Generator[Advance]:
        """A piece of work of ``total`` units; call what it gives with the units done and a word on the state."""
        if self.console.is_terminal:
            with self._live() as progress:
                task = progress.add_task(name, total=total, completed=done, info="")
                yield lambda done, info="": progress.update(task, completed=done, info=info)
        else:
            yield self._plain(name, total, done)

    def _live(self) -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}", markup=False),
            console=self.console,
            expand=True,
        )

    def _plain(self, name: str, total: int, first: int) -> Advance:
        began = last = time.monotonic()

        def advance(done: int, info: str = "") -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < self.interval and done < total:
                return
            last = now
            left = (now - began) / max(1, done - first) * (total - done)
            ending = f"{clock(left)} left" if done < total else f"{clock(now - began)}"
            self.note(f"{name} {done}/{total}  {info + '  ' if info else ''}{ending}")

        return advance


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
