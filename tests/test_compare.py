"""``distillm compare``: seeds in one row, marks by the bootstrap, formats that read back, files of scores."""

import csv
import json
import random
import re
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from command_line import distillm, done, refused
from distillm.errors import ConfigError
from distillm.evaluation import METRICS, paired_bootstrap, score_predictions
from distillm.report import as_latex, compare_table, table_cells, with_differences
from distillm.report.differences import SAMPLES
from fabricated_run import CONFIG, write_lines
from tiny_run import materials, tiny_run

ROWS = 30
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "over", "hills", "of", "red", "sand"]


def scored(quality: float, seed: int, metrics: list[str], *, offset: int = 0, decoding: int = 2) -> dict[str, Any]:
    """Answers that keep each word of their reference with this probability."""
    wanted, draw = random.Random(99 + offset), random.Random(seed)
    rows: list[dict[str, Any]] = []
    for i in range(ROWS):
        words = [wanted.choice(WORDS) for _ in range(8)]
        said = [[w if draw.random() < quality else draw.choice(WORDS) for w in words] for _ in range(decoding)]
        rows.append({"id": f"t:{i}", "references": [" ".join(words)], "predictions": [" ".join(s) for s in said]})
    return score_predictions(rows, "t", metrics)


def make(
    folder: Path,
    quality: float,
    *,
    seed: int | None = 1,
    method: str = "kd",
    data: tuple[str, ...] = ("test",),
    metrics: tuple[str, ...] = ("rouge_l", "bleu", "distinct_1"),
    offset: int = 0,
) -> Path:
    (folder / "eval").mkdir(parents=True)
    config = CONFIG | {"method": {"name": method}, "seed": seed, "output": str(folder)}
    config["data"] = CONFIG["data"] | {"responses_file": f"{folder}.jsonl"}
    (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    write_lines(folder / "metrics.jsonl", [{"kind": "step", "step": 4, "loss": 1.0, "seconds": float(seed or 0)}])
    for name in data:
        for system, of in (("before", 0.05), ("student", quality)):
            number = sum(f"{method} {seed} {system}".encode())
            found = scored(of, number, list(metrics), offset=offset)
            head = {"data": name, "system": system, "model": "m"}
            (folder / "eval" / f"{name}-{system}.json").write_text(json.dumps(head | found), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three good runs of one method and two bad ones of another, as a sweep names them."""
    home = tmp_path_factory.mktemp("grid")
    good = [make(home / f"distillm_seed-{s}", 0.8, seed=s, method="distillm") for s in (1, 2, 3)]
    return [*good, *(make(home / f"kd_seed-{s}", 0.4, seed=s) for s in (1, 2))]


def mean_of(run: Path, name: str, system: str = "student") -> float:
    return json.loads((run / "eval" / f"test-{system}.json").read_text())["scores"][name]["mean"]


# ------------------------------------------------------------------------------------------------------------- grouping


def test_runs_that_differ_in_their_seed_alone_share_a_row(runs: list[Path]):
    rows = compare_table(runs, grouped=True)
    assert [(row.run, row.system, row.runs) for row in rows] == [
        *(("distillm", system, 3) for system in ("before", "student")),
        *(("kd", system, 2) for system in ("before", "student")),
    ]
    found = rows[1].scores["rouge_l"]
    means = [mean_of(run, "rouge_l") for run in runs[:3]]
    assert (found.mean, found.std, found.num_seeds) == (
        pytest.approx(statistics.fmean(means)),
        pytest.approx(statistics.stdev(means)),
        3,
    )
    assert (rows[1].seconds, rows[1].steps, rows[1].seeds) == (2.0, 4, 2)
    header, body = table_cells(rows)
    assert body[1][header.index("Runs")] == "3"
    assert body[1][header.index("ROUGE-L")] == f"{found.mean:.2f} ± {found.std:.2f}"


def test_each_run_has_its_own_row_on_request(runs: list[Path]):
    rows = compare_table(runs)
    assert [row.run for row in rows if row.system == "student"] == [run.name for run in runs]
    assert "Runs" not in table_cells(rows)[0]
    assert "kd_seed-2" in done("compare", *runs, "--each")
    assert "kd_seed-2" not in done("compare", *runs)


def test_the_same_seed_twice_is_not_two_draws(tmp_path: Path):
    two = [make(tmp_path / name, 0.5, seed=7) for name in ("a", "b")]
    assert [(row.run, row.runs) for row in compare_table(two, grouped=True)] == [("a", 1)] * 2 + [("b", 1)] * 2


def test_other_settings_are_another_row_and_names_are_kept_apart(tmp_path: Path):
    one, other = make(tmp_path / "kd-1", 0.5, seed=1), make(tmp_path / "kd-2", 0.5, seed=2, method="gkd")
    assert {row.run for row in compare_table([one, other], grouped=True)} == {"kd-1", "kd-2"}
    third = make(tmp_path / "other", 0.5, seed=3)
    assert {row.run for row in compare_table([one, third], grouped=True)} == {"kd-1 and 1 more"}


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (("kd-0.1_seed-1", "kd-0.1_seed-2"), "kd-0.1"),
        (("seed-1_kd", "seed-2_kd"), "kd"),
        (("kd_s1", "kd_s2"), "kd"),
        (("runs.1", "runs.2"), "runs"),
    ],
)
def test_a_group_is_called_what_its_runs_are_without_the_seed(tmp_path: Path, names: tuple[str, ...], group: str):
    two = [make(tmp_path / name, 0.5, seed=i + 1) for i, name in enumerate(names)]
    assert {row.run for row in compare_table(two, grouped=True)} == {group}


def test_runs_without_settings_stay_alone(runs: list[Path], tmp_path: Path):
    for name in "ab":
        shutil.copytree(runs[0], tmp_path / name)
        (tmp_path / name / "run.yaml").unlink()
    assert {row.run for row in compare_table([tmp_path / "a", tmp_path / "b"], grouped=True)} == {"a", "b"}


# ------------------------------------------------------------------------------------------------------------- baseline


def statistics_of(run: Path, name: str) -> Any:
    rows = json.loads((run / "eval" / "test-student.json").read_text())["predictions"]
    wanted = [row["references"] for row in rows]
    return np.stack([METRICS[name].statistics([row["predictions"][s] for row in rows], wanted) for s in range(2)])


@pytest.mark.parametrize("baseline", ["kd", "kd:student", "kd_seed-2"])
def test_differences_are_those_of_the_bootstrap_over_rows_and_runs(runs: list[Path], baseline: str):
    rows, notes = with_differences(compare_table(runs, grouped=True), baseline)
    assert notes == []
    student = rows[1]
    for name in ("rouge_l", "bleu"):
        one, other = ([statistics_of(run, name) for run in part] for part in (runs[:3], runs[3:]))
        assert student.differences[name] == paired_bootstrap(one, other, METRICS[name].score, samples=SAMPLES)
        assert student.differences[name].difference == pytest.approx(
            student.scores[name].mean - rows[3].scores[name].mean
        )
    assert student.differences.keys() == {"rouge_l", "bleu"}  # not distinct_1, whose rows do not stand alone
    assert student.baseline == "kd:student"
    assert rows[3].differences == {}
    header, body = table_cells(rows)
    assert body[1][header.index("BLEU")].endswith("‡")
    assert not body[3][header.index("BLEU")].endswith(("†", "‡"))


def test_a_system_is_the_baseline_of_its_own_run(runs: list[Path]):
    rows, _ = with_differences(compare_table(runs, grouped=True), "before")
    assert [row.baseline for row in rows] == [None, "distillm:before", None, "kd:before"]
    assert rows[1].differences["rouge_l"].low > 0


def test_an_unknown_baseline_is_refused(runs: list[Path]):
    with pytest.raises(ConfigError, match="no such run or system in the table; there are distillm, kd, before"):
        with_differences(compare_table(runs, grouped=True), "gkd")
    assert "--baseline kd:teacher: no such" in refused("compare", *runs, "--baseline", "kd:teacher")


def test_what_cannot_be_tested_is_said(runs: list[Path], tmp_path: Path):
    other = make(tmp_path / "other", 0.6, seed=5, method="sft", offset=1)
    stale = make(tmp_path / "stale", 0.6, seed=5, method="gkd")
    bare = make(tmp_path / "bare", 0.6, seed=5, method="seqkd")
    for run, changed in ((stale, "scores"), (bare, "predictions")):
        path = run / "eval" / "test-student.json"
        record = json.loads(path.read_text())
        if changed == "scores":
            record["scores"]["bleu"]["mean"] += 1
        else:
            del record["predictions"]
        path.write_text(json.dumps(record))
    said = distillm("compare", *runs, other, stale, bare, "--baseline", "kd")
    assert said.code == 0
    assert "other (student) and kd (student) are not tested on test: they were not scored on the same rows" in said.err
    assert "bare (student) and kd (student) are not tested on test: their predictions were not kept" in said.err
    assert "stale/eval/test-student.json: bleu does not come out as it was written" in said.err
    rows, _ = with_differences(compare_table([*runs, stale], grouped=True), "kd")
    assert rows[-1].differences.keys() == {"rouge_l"}


def test_each_data_set_has_the_baseline_scored_on_it(tmp_path: Path):
    one = make(tmp_path / "one", 0.8, data=("a", "b"))
    other = make(tmp_path / "other", 0.3, data=("a",), method="gkd")
    rows, _ = with_differences(compare_table([one, other], grouped=True), "other")
    assert {row.data: bool(row.differences) for row in rows if row.system == "student" and row.run == "one"} == {
        "a": True,
        "b": False,
    }


# -------------------------------------------------------------------------------------------------------------- formats


def test_every_format_holds_the_marks_or_the_intervals(runs: list[Path], tmp_path: Path):
    targets = {ending: tmp_path / f"t.{ending}" for ending in ("md", "csv", "tex", "json")}
    for target in targets.values():
        printed = done("compare", *runs, "--baseline", "kd", "-o", target)
    assert "‡ p < 0.01 against kd:student (paired bootstrap over the same rows, 2000 samples)" in printed
    assert "±: standard deviation over training runs" in printed
    rows, _ = with_differences(compare_table(runs, grouped=True), "kd")
    wanted = rows[1].differences["bleu"]
    line = list(csv.DictReader(targets["csv"].read_text().splitlines()))[1]
    found = [float(line[f"bleu_{part}"]) for part in ("difference", "low", "high", "p")]
    assert found == [wanted.difference, wanted.low, wanted.high, wanted.p]
    assert (line["runs"], line["baseline"], line["bleu_seeds"]) == ("3", "kd:student", "3")
    record = json.loads(targets["json"].read_text())[1]
    assert record["differences"]["bleu"] == {"difference": found[0], "low": found[1], "high": found[2], "p": found[3]}
    assert record["members"] == [run.name for run in runs[:3]]
    markdown = targets["md"].read_text()
    assert "‡ |" in markdown
    assert markdown.count("\n\n") == 2  # the two lines that explain the signs
    latex = targets["tex"].read_text()
    assert r"$^\ddagger$" in latex
    assert r"\toprule" in latex
    assert "% Data: test · Steps" not in latex  # one a line
    assert "% Data: test\n" in latex
    assert not re.search(r"(?m)^[^%].*[±†‡–]", latex)


@given(st.text(max_size=30))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_latex_is_one_table_whatever_the_names(name: str):
    from dataclasses import replace

    from distillm.report import Row

    row = Row(name, Path("p"), name, "d", None, None, {}, None, None, None)
    lines = as_latex([row, replace(row, run="other", system="x")]).splitlines()
    inside = [line for line in lines if not line.startswith(("%", "\\begin", "\\end", "\\top", "\\mid", "\\bottom"))]
    assert len(inside) == 3
    for line in inside:
        bare = re.sub(r"\\[&%$#_{}\\]|\\text\w+\{\}|\$\\pm\$|\$\^\\d?dagger\$", "", line)
        assert not re.search(r"[%$#_{}~^\\]", bare), line
    assert len({line.count("&") - line.count("\\&") for line in inside}) == 1


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(runs: list[Path], tmp_path: Path):
    done("compare", *runs, "--baseline", "kd", "-o", tmp_path / "t.tex")
    page = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{t.tex}\end{document}"
    (tmp_path / "page.tex").write_text(page)
    subprocess.run(["pdflatex", "-halt-on-error", "page.tex"], cwd=tmp_path, check=True, capture_output=True)


# ------------------------------------------------------------------------------------------------------ files of scores


def test_files_of_scores_stand_beside_runs(runs: list[Path], tmp_path: Path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"data": "test", "system": "student", "model": None} | scored(0.9, 5, ["bleu"])))
    rows, notes = with_differences(compare_table([*runs, path], grouped=True), "mine")
    assert notes == []
    assert (rows[-1].run, rows[-1].system, rows[-1].data, rows[-1].steps) == ("mine", "student", "test", None)
    assert rows[1].differences.keys() == {"bleu"}
    assert "mine" in done("compare", path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"scores": 3}'])
def test_a_file_without_scores_is_refused(tmp_path: Path, text: str):
    (tmp_path / "x.json").write_text(text)
    assert "x.json holds no scores as `distillm eval` writes them" in refused("compare", tmp_path / "x.json")
    assert "does not exist" in refused("compare", tmp_path / "nowhere.json")


# ------------------------------------------------------------------------------------------------------------- for real


def test_runs_scored_and_compared_by_the_commands(tmp_path: Path):
    made = materials(tmp_path)
    for seed in (1, 2):
        folder = tmp_path / f"run_seed-{seed}"
        folder.mkdir()
        from distillm.config import as_yaml

        run = tiny_run(made, folder, {"seed": seed})
        (folder / "run.yaml").write_text(as_yaml(run), encoding="utf-8")
        (folder / "student").symlink_to(made / "student")
        done("eval", folder, "--data", made / "test.jsonl", "--metrics", "rouge_l,bleu,chrf,ter")
        done("eval", folder, "--data", made / "test.jsonl", "--system", "teacher", "--metrics", "rouge_l,bleu,chrf,ter")
    both = [tmp_path / f"run_seed-{seed}" for seed in (1, 2)]
    text = done("compare", *both, "--baseline", "teacher", "-o", tmp_path / "t.json")
    for part in ("BLEU", "chrF", "TER", "Perplexity", "Top-1 agreement", "Run: run", "Runs: 2", "run:teacher"):
        assert part in text, part
    student, teacher = json.loads((tmp_path / "t.json").read_text())
    assert (student["system"], teacher["system"]) == ("student", "teacher")
    assert student["differences"].keys() == {"rouge_l", "bleu", "chrf", "ter"}
    # Both runs have the same models, and so the same scores.
    assert student["scores"]["rouge_l"]["std"] == teacher["scores"]["rouge_l"]["std"] == 0
