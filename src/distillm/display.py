"""What a user sees while work goes on: live bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column, Table

from .screen import visible

Advance = Callable[..., None]
"""Told the units done, a word on the state, and perhaps a figure whose course is drawn."""

BLOCKS = "▁▂▃▄▅▆▇█"
COURSE = 12
"""Blocks of a course, and characters of the shortest text that is quoted."""


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

    def sample(self, prompt: str, response: str) -> None:
        """A prompt and what was answered, on one line of the terminal (of 80 characters elsewhere)."""
        width = max(self.console.width if self.console.is_terminal else 80, 40) - 14
        asked = _quoted(prompt, width // 2)
        self.note(f"  sample  {asked} -> {_quoted(response, width - len(asked))}")

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Generator[Advance]:
        """A piece of work of ``total`` units; call what it gives with the units done and a word on the state."""
        if self.console.is_terminal:
            with self._live(name, total) as progress:
                task, course = progress.add_task(name, total=total, completed=done, info=""), Course()

                def advance(done: int, info: str = "", figure: float | None = None) -> None:
                    drawn = course.drawn(figure) if self.console.encoding.startswith("utf") else ""
                    progress.update(task, completed=done, info=f"{drawn} {info}" if drawn else info)

                yield advance
        else:
            yield self._plain(name, total, done)

    def _live(self, name: str, total: int) -> Progress:
        width = self.console.width
        named = min(len(name), width * 3 // 8)
        fixed = 1 + 4 + (2 * len(str(total)) + 1) + 7 + 5  # spinner, a short bar, units, time left, gaps
        said = max(COURSE, width - named - fixed)

        def column(most: int) -> Column:
            return Column(no_wrap=True, overflow="ellipsis", max_width=most)

        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False, table_column=column(named)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
            TextColumn("{task.fields[info]}", markup=False, table_column=column(said)),
            console=self.console,
            expand=True,
        )

    def _plain(self, name: str, total: int, first: int) -> Advance:
        began = last = time.monotonic()

        def advance(done: int, info: str = "", figure: float | None = None) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < self.interval and done < total:
                return
            last = now
            left = (now - began) / max(1, done - first) * (total - done)
            ending = f"{clock(left)} left" if done < total else f"{clock(now - began)}"
            self.note(f"{name} {done}/{total}  {info + '  ' if info else ''}{ending}")

        return advance


class Course:
    """How a figure went, in a few blocks: means of equally long stretches, the lowest of which is the lowest block."""

    def __init__(self) -> None:
        self._sums: list[tuple[float, int]] = []
        self._each = 1

    def drawn(self, figure: float | None) -> str:
        """The course with ``figure`` at its end; "" while there is none to draw."""
        if figure is not None:
            self._add(figure)
        means = [total / count for total, count in self._sums]
        if len(means) < 2:
            return ""
        low, high = min(means), max(means)
        steps = len(BLOCKS) - 1
        return "".join(BLOCKS[round(steps * (mean - low) / (high - low)) if high > low else 0] for mean in means)

    def _add(self, figure: float) -> None:
        if self._sums and self._sums[-1][1] < self._each:
            total, count = self._sums[-1]
            self._sums[-1] = total + figure, count + 1
            return
        self._sums.append((figure, 1))
        if len(self._sums) > COURSE:  # twice as long stretches from here on
            pairs = [self._sums[i : i + 2] for i in range(0, len(self._sums), 2)]
            self._sums = [(sum(total for total, _ in pair), sum(count for _, count in pair)) for pair in pairs]
            self._each *= 2


def _quoted(text: str, most: int) -> str:
    line = " ".join(text.split())
    most = max(most, COURSE) - 2
    return f'"{line if len(line) <= most else line[: most - 1] + "…"}"'


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
