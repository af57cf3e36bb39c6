"""What is shown while work goes on: plain lines in a file, bars on a terminal, nothing when quiet."""

import io

import pytest
from rich.console import Console

from distillm.display import Display, clock


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
