"""What a user sees: plain lines where there is no terminal, bars where there is one; and a run's origin."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from distillm import display
from distillm.display import Display, clock
from distillm.provenance import provenance
from tiny import tiny_causal


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00")])
def test_times_are_shown_as_a_clock_shows_them(seconds: float, shown: str):
    assert clock(seconds) == shown


def test_without_a_terminal_progress_is_a_line_now_and_then_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    out = io.StringIO()
    shown = Display(Console(file=out, soft_wrap=True, highlight=False), interval=10)
    with shown.phase("train", 8, 2) as advance:
        for done in range(3, 9):
            now += 4
            advance(done, f"loss {done}")
    shown.note("a [bold]name[/bold] stays as it is")
    assert out.getvalue().splitlines() == [
        "train 5/8  loss 5  0:12 left",
        "train 8/8  loss 8  0:24",
        "a [bold]name[/bold] stays as it is",
    ]


def test_on_a_terminal_progress_is_a_bar_with_the_phase_and_its_figures():
    out = io.StringIO()
    shown = Display(Console(file=out, force_terminal=True, width=100))
    with shown.phase("train", 8) as advance:
        advance(8, "loss 1.250")
    for part in ("train", "8/8", "loss 1.250"):
        assert part in out.getvalue()


def test_a_quiet_display_shows_nothing(capsys: pytest.CaptureFixture[str]):
    shown = Display(quiet=True)
    shown.note("x")
    with shown.phase("train", 1) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_the_origin_of_a_run_has_no_revision_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    model = tiny_causal()
    found = provenance({"student": model, "teacher": None}, model.device, None)
    assert found["git"] is None
    assert found["models"] == {
        "student": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": 2,
            "width": 32,
            "vocabulary": 300,
        }
    }
    monkeypatch.setenv("PATH", "")  # no git at all
    assert provenance({}, model.device, "distillm train x")["git"] is None
