"""Reports on partial runs and on several, and the comparison as a table."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from distillm.errors import DataError, StorageError
from distillm.report import as_csv, as_markdown, compare_table, read_run, table_cells, write_report
from distillm.report.charts import run_charts
from fabricated_run import evaluation, fabricate, write_lines
from report_page import records, report


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate(tmp_path_factory.mktemp("runs") / "kitchen")


# Partial runs.


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("run.yaml", "run.yaml is missing"),
        ("metrics.jsonl", "No training step is recorded"),
        ("samples.jsonl", "No sample is recorded"),
        ("eval", "No evaluation is recorded"),
    ],
)
def test_missing_part_is_told(tmp_path: Path, gone: str, said: str):
    run = fabricate(tmp_path / "run", num_steps=10, every=5)
    (run / gone).rename(tmp_path / "elsewhere")
    page = report(run)
    (notes,) = page.all("aside")
    assert said in notes
    assert len(page.all("h1")) == 1


def test_a_run_that_goes_on_says_so(tmp_path: Path):
    run = fabricate(tmp_path / "run", num_steps=10, every=5)
    (run / "student").rmdir()
    assert report(run).all("p", class_="status") == [
        "This run is still going on, or was killed: it has made 10 of 120 steps so far."
    ]
    (run / "metrics.jsonl").unlink()
    page = report(run)
    assert page.all("p", class_="status") == []
    assert "There is no student folder: the run was stopped before its end" in page.all("aside")[0]


def test_whole_run_misses_nothing(whole: Path):
    assert read_run(whole).notes == []
    assert report(whole).all("aside") == []
    assert report(whole).all("p", class_="status") == []


def test_only_a_configuration(tmp_path: Path):
    run = tmp_path / "young"
    run.mkdir()
    (run / "run.yaml").write_text("method: {name: kd}\n")
    page = report(run)
    assert page.all("h1") == ["young"]
    assert page.verdict == {}
    assert page.charts == {}
    assert page.all("script", id="plotly") == []


def test_lines_torn_by_a_kill_are_left_out_and_told(tmp_path: Path):
    run = fabricate(tmp_path / "run", num_steps=10, every=5)
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + '{"kind": "step", "step": 11, "lo')
    torn = read_run(run)
    assert torn.last_step == 10
    assert any("metrics.jsonl: line 17 could not be read" in note for note in torn.notes)
    # A resumed run goes on in the same line.
    resumed = (
        '{"kind": "event", "step": 10, "event": "resumed", "message": ""}\n{"kind": "step", "step": 11, "loss": 1.0}\n'
    )
    (run / "metrics.jsonl").write_text(whole + '{"kind": "step", "step": 11, "lo' + resumed)
    assert read_run(run).last_step == 11
    assert "could not be read" in report(run).all("aside")[0]


def test_steps_repeated_after_a_resume_count_once_and_the_last_holds(tmp_path: Path):
    run = fabricate(tmp_path / "run", num_steps=10, every=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "event", "step": 8, "event": "resumed", "message": "from step 8"}\n')
        for step in (9, 10, 11):
            file.write(json.dumps({"kind": "step", "step": step, "loss": float(step), "seconds": 1.0}) + "\n")
    steps = read_run(run).steps
    assert [step["step"] for step in steps] == list(range(1, 12))
    assert [step["loss"] for step in steps[-3:]] == [9.0, 10.0, 11.0]


def test_a_skipped_step_is_a_gap_and_is_counted(tmp_path: Path):
    for num_steps in (6, 20):  # without and with a smoothed curve
        run = fabricate(tmp_path / str(num_steps), num_steps=num_steps, every=5)
        steps = records(run / "metrics.jsonl", "step")
        skipped = [4, 5]
        entries = [{**step, **({"loss": None, "terms": {}} if step["step"] in skipped else {})} for step in steps]
        events = [{"kind": "event", "step": step, "event": "skipped", "message": ""} for step in (4, 5, 5)]
        write_lines(run / "metrics.jsonl", entries + events)
        page = report(run)
        drawn = page.charts["run-1-loss"]["series"]
        assert drawn[0]["x"] == [step["step"] for step in steps]
        assert [x for x, y in zip(drawn[0]["x"], drawn[0]["y"], strict=True) if y is None] == skipped
        assert all(y is not None for line in drawn[1:] for y in line["y"])
        assert f"{num_steps} of 120, of which 2 skipped (no target token)" in page.all("td")


def test_interruption_is_told_until_the_run_goes_on(tmp_path: Path):
    run = fabricate(tmp_path / "run", num_steps=10, every=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "event", "step": 10, "event": "interrupted", "message": "Ctrl-C"}\n')
    page = report(run)
    assert "interrupted at step 10" in page.all("aside")[0]
    assert "in 10 training steps so far" in page.verdict["At what cost"]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "event", "step": 10, "event": "resumed", "message": ""}\n')
    assert read_run(run).notes == []
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "event", "step": 10, "event": "failed", "message": "the loss is not finite"}\n')
    assert "failed at step 10 and has not been resumed: the loss is not finite" in report(run).all("aside")[0]


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ({"teacher": {"path": "org/big"}, "student": {"path": "small/"}}, "big into small, by kd"),
        ({"teacher": {"path": "big.gguf"}, "student": {"path": None, "layers": 8}}, "big.gguf into 8 layers, by kd"),
        ({"teacher": {"path": "big"}, "student": {"layers": [0, 7]}}, "big into layers 0, 7, by kd"),
        ({"teacher": {"path": "big"}, "student": {"config": {"width": 2}}}, "big into a student, by kd"),
        ({"teacher": None, "student": {"path": "small"}}, "small, by kd"),
        ({}, "run"),
    ],
)
def test_title_names_what_is_known(tmp_path: Path, models: dict[str, Any], expected: str):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.yaml").write_text(yaml.safe_dump({**models, "method": {"name": "kd"}}))
    assert report(run).all("h1") == [expected]


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path):
    run = fabricate(tmp_path / "run", num_steps=10, every=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 11, "loss": NaN, "terms": null, "seconds": "x", "batch": 3}\n')
        file.write('{"kind": "step", "step": 12, "loss": Infinity, "terms": {"distill": null}}\n')
        file.write('{"kind": "step", "step": "13", "loss": 1.0}\n[1, 2]\n')
        file.write('{"kind": "validation", "step": 12, "cross_entropy": NaN, "divergence": null}\n')
    page = report(run)
    assert page.column("All 12 training steps", "Loss")[-2:] == ["–", "–"]
    assert page.charts["run-1-loss"]["series"][0]["x"][-1] == 10


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"scores": {}}', '{"scores": {"rouge_l": 3}}', '{"scores": null, "seeds": 3}']
)
def test_broken_evaluation_is_left_out_and_told(tmp_path: Path, text: str):
    run = fabricate(tmp_path / "run", num_steps=10, every=5)
    (run / "eval" / "broken.json").write_text(text)
    page = report(run)
    assert "eval/broken.json" in page.all("aside")[0]
    assert len(page.table("Scores")) == 5


@pytest.mark.parametrize("text", ["a: [", "- 1", "just words", "\ttab: 1"])
def test_broken_configuration_is_shown_as_it_is(tmp_path: Path, text: str):
    run = fabricate(tmp_path / "run", num_steps=10, every=5)
    (run / "run.yaml").write_text(text)
    page = report(run)
    assert "run.yaml" in page.all("aside")[0]
    assert text in page.all("code")


def test_folder_that_is_no_run_is_an_error(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"not a run folder.*run\.yaml and metrics\.jsonl.*it holds notes\.txt"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(DataError, match=r"does not exist.*run\.yaml"):
        compare_table([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="is a file, not a run folder"):
        read_run(tmp_path / "notes.txt")
    with pytest.raises(DataError, match="no run folder given"):
        write_report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_unwritable_output_is_an_error_and_leaves_nothing(whole: Path, tmp_path: Path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match=r"taken is a folder; give the name of a file"):
        write_report([whole], tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# Several runs.


def test_several_runs_are_laid_over_one_another(whole: Path, tmp_path: Path):
    other = fabricate(tmp_path / "kitchen", num_steps=40, every=10, num_samples=2)
    page = report(other, whole)
    assert page.all("h1") == ["2 runs compared"]
    names = [f"{tmp_path.name}/kitchen", f"{whole.parent.name}/kitchen"]
    assert page.all("h2")[1:] == names
    overlay = page.charts["all-divergence"]["series"]
    assert [line["name"] for line in overlay] == names
    for line, run in zip(overlay, (other, whole), strict=True):
        expected = records(run / "metrics.jsonl", "validation")
        assert line["x"] == [row["step"] for row in expected]
        assert line["y"] == pytest.approx([row["divergence"] for row in expected], rel=1e-5)
    assert page.column("All runs", "Steps") == ["40", "120"]
    assert page.column("All runs", "ROUGE-L, kitchen-test") == ["29.70 ± 0.41"] * 2
    assert len(page.table("Every system")) == 9
    assert len(page.source.encode()) < 5_000_000


def test_the_same_run_twice_has_two_names(whole: Path):
    assert len({row.run for row in compare_table([whole, whole])}) == 2


def test_comparison_has_a_row_for_each_run_system_and_data_set(whole: Path, tmp_path: Path):
    bare = fabricate(tmp_path / "bare", num_steps=10, every=5)
    (bare / "eval").rename(tmp_path / "eval")
    rows = compare_table([whole, bare])
    assert [(row.run, row.system, row.data) for row in rows] == [
        *(("kitchen", system, "kitchen-test") for system in ("before", "sft", "student", "teacher")),
        ("bare", None, None),
    ]
    student = rows[2]
    assert student.method == "distillm"
    assert student.student_parameters == 49556160
    assert (student.scores["rouge_l"].mean, student.scores["rouge_l"].std) == (29.7031, 0.4137)
    assert student.scores["rouge_l"].num_seeds == 3
    assert student.best_divergence == min(row["divergence"] for row in records(whole / "metrics.jsonl", "validation"))
    assert student.steps == 120
    assert student.seconds == pytest.approx(sum(row["seconds"] for row in records(whole / "metrics.jsonl", "step")))
    header, body = table_cells(rows)
    assert all(len(line) == len(header) for line in body)
    assert body[2][header.index("ROUGE-L")] == "29.70 ± 0.41"
    assert body[4][header.index("ROUGE-L")] == "–"


def test_csv_keeps_the_numbers_exactly(whole: Path):
    rows = compare_table([whole])
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [row["system"] for row in read] == ["before", "sft", "student", "teacher"]
    for row, line in zip(rows, read, strict=True):
        assert float(line["rouge_l_mean"]) == row.scores["rouge_l"].mean
        assert float(line["rouge_l_std"]) == row.scores["rouge_l"].std
        assert int(line["divergence_seeds"]) == 1
        assert float(line["seconds"]) == row.seconds
        assert float(line["best_validation_divergence"]) == row.best_divergence


def test_markdown_is_one_table_whatever_the_names(tmp_path: Path):
    run = fabricate(tmp_path / "run", num_steps=10, every=5)
    (run / "eval" / "odd.json").write_text(json.dumps(evaluation("a|b\nc", 1.5, 1.0, data="x\\|y")))
    lines = as_markdown(compare_table([run])).splitlines()
    assert len(lines) == 2 + 5
    assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines}) == 1
    assert any("a\\|b c" in line for line in lines)


def test_a_single_term_is_not_drawn_twice(tmp_path: Path):
    run = fabricate(tmp_path / "run", num_steps=12, every=5)
    write_lines(
        run / "metrics.jsonl",
        [{"kind": "step", "step": step, "loss": 1.0, "terms": {"distill": 1.0}} for step in range(1, 13)],
    )
    assert [chart.id for chart in run_charts(read_run(run), "a", 100)] == ["a-loss"]
