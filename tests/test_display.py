"""What is shown while work goes on: plain lines in a file, bars on a terminal, nothing when quiet."""

import io
import re

import pytest
from rich.console import Console

from distillm.display import BLOCKS, COURSE, Course, Display, clock


def plain(interval: float) -> tuple[Display, io.StringIO]:
    text = io.StringIO()
    return Display(Console(file=text, width=200, markup=False, highlight=False), interval=interval), text


def test_plain_lines_come_at_intervals_and_always_at_the_end():
    display, text = plain(interval=1e6)
    with display.phase("train", 5) as advance:
        for done in range(1, 6):
            advance(done, "loss 1.5")
    (line,) = text.getvalue().splitlines()
    assert line.startswith("train 5/5  loss 1.5  0:00")
    display, text = plain(interval=0)
    with display.phase("train", 3) as advance:
        for done in range(1, 4):
            advance(done)
    assert [line.split()[1] for line in text.getvalue().splitlines()] == ["1/3", "2/3", "3/3"]
    assert "left" in text.getvalue().splitlines()[0]


def test_time_left_is_counted_from_where_the_work_went_on(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("distillm.display.time.monotonic", lambda: now[0])
    display, text = plain(interval=0)
    with display.phase("train", 100, done=80) as advance:
        now[0] += 30
        advance(90)  # ten steps in 30 seconds, and ten to go
    assert text.getvalue() == "train 90/100  0:30 left\n"


def test_a_terminal_gets_a_bar_with_the_state_of_the_work():
    text = io.StringIO()
    display = Display(Console(file=text, force_terminal=True, width=100))
    with display.phase("score on [bold]mine[/x]", 4) as advance:
        advance(2, "loss [1]")
        advance(4, "loss [0]")
    shown = text.getvalue()
    for part in ("score on [bold]mine[/x]", "4/4", "loss [0]"):
        assert part in shown


def test_notes_are_shown_as_they_are_and_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]):
    display, text = plain(interval=0)
    display.note("row [/red] of [bold]")
    assert text.getvalue() == "row [/red] of [bold]\n"
    quiet = Display(quiet=True)
    quiet.note("hello")
    with quiet.phase("work", 1) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")
    Display().note("to the user")
    assert capsys.readouterr() == ("", "to the user\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.4, "59:59"), (3600, "1:00:00"), (36061, "10:01:01")],
)
def test_clock_by_hand(seconds: float, text: str):
    assert clock(seconds) == text


def test_a_course_is_drawn_in_a_few_blocks_whatever_its_length() -> None:
    course = Course()
    assert course.drawn(None) == ""
    assert course.drawn(3.0) == ""
    assert course.drawn(1.0) == BLOCKS[-1] + BLOCKS[0]
    falling = Course()
    for step in range(10_000):
        drawn = falling.drawn(1 / (step + 1))
    assert 2 < len(drawn) <= COURSE
    assert drawn[0] == BLOCKS[-1]
    assert drawn[-1] == BLOCKS[0]
    assert sorted(drawn, reverse=True) == list(drawn)
    flat = Course()
    assert {flat.drawn(2.0) for _ in range(50)} <= {"", *(BLOCKS[0] * n for n in range(2, COURSE + 1))}


def test_the_bar_fits_80_columns_whatever_is_said() -> None:
    text = io.StringIO()
    display = Display(Console(file=text, force_terminal=True, width=80, height=20))
    with display.phase("score the student before training on a set with a long name", 4) as advance:
        for done in range(5):
            advance(done, "loss 2.345  1234 tok/s  dataset  p 0.1  buffer 48", 5.0 - done)
    last = text.getvalue().rstrip("\n").split("\n")[-1]
    assert BLOCKS[-1] in text.getvalue()
    assert "4/4" in text.getvalue()
    seen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", last).strip("\r")
    assert len(seen) <= 80


def test_a_sample_is_one_line() -> None:
    display, text = plain(interval=0)
    display.sample("What does\na glassblower do, " * 9, "shapes [red]glass[/red]")
    (line,) = text.getvalue().splitlines()
    assert len(line) <= 80
    assert line.startswith('  sample  "What does a glassblower')
    assert '-> "shapes [red]glass[/red]"' in line
