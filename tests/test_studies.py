"""The studies: pages from kept results alone, results of the settings beside them, claims decided by intervals."""

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from distillm.display import Display
from distillm.errors import ConfigError
from distillm.evaluation import METRICS
from studies import claims, make, pages, plan, results, smoke
from studies.__main__ import app
from studies.plan import Place, Study
from studies.results import Result
from studies.text import named

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "studies"
PLAIN = re.compile(r"[\w .,:+/-]{0,48}|nrefs:[\w|:.+-]+")
"""What a text in a file of results may be: a name, a version, a time, a digest, a span of row ids, a signature."""


def folder(name: str) -> Path:
    return ROOT / "studies" / name / "results"


def kept() -> list[Any]:
    found = [(name, result) for name in plan.names() for result in results.load(folder(name)).values()]
    return [pytest.param(name, result, id=f"{name}-{result.name}") for name, result in found]


def is_run(result: Result) -> bool:
    return "curve" in result.record


RUNS = [each for each in kept() if is_run(each.values[1])]


def texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in (str(key), *texts(inner))]
    return (
        [text for inner in value for text in texts(inner)]
        if isinstance(value, list)
        else [value] * isinstance(value, str)
    )


@pytest.fixture(name="place", scope="module")
def _place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    scratch = tmp_path_factory.mktemp("studies")
    smoke.write_rows(scratch / "rows")
    return Place(str(scratch / "rows"), str(scratch / "runs"), smoke=True)


@pytest.fixture(name="study", scope="module")
def _study() -> Study:
    study = plan.read("multi30k")
    return study.model_copy(update={"smoke": study.smoke.model_copy(update={"variants": ["sft", "seqkd"]})})


@pytest.fixture(name="made", scope="module")
def _made(study: Study, place: Place) -> Place:
    assert make.make(study, place, Display(quiet=True)) == {}
    return place


def test_the_pages_are_those_of_the_results(tmp_path: Path) -> None:
    made = pages.write(tmp_path, folder)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in DOCS.iterdir()}
    assert {path.name for path in made} >= {"index.md", "claims.md", "time.md"}
    for path in sorted(tmp_path.iterdir()):
        assert path.read_bytes() == (DOCS / path.name).read_bytes(), f"{path.name}: run python -m studies pages"


def test_the_readme_counts_as_the_claims_do() -> None:
    page = (DOCS / "claims.md").read_text(encoding="utf-8")
    row = re.search(r"^\| DistiLLM is better than KD and SeqKD \|(.*)\|$", page, re.MULTILINE)
    assert row
    held, open_, reversed_, _, _ = (int(cell) for cell in row[1].split("|"))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    counts = f"of {held + open_ + reversed_} comparisons with KD and SeqKD over three seeds"
    assert f"{counts} DistiLLM is ahead in {held}, behind in {reversed_}, and {open_} are open" in readme


@pytest.mark.parametrize(("name", "result"), kept())
def test_results_hold_figures_and_row_ids_alone(name: str, result: Result) -> None:
    path = folder(name) / f"{result.name}.json"
    assert path.stat().st_size < 200_000
    assert [text for text in texts(result.record) if not PLAIN.fullmatch(text)] == []


@cache
def digests(name: str) -> dict[str, str]:
    """Of every run and stage of a study, as its files are now."""
    study, place = plan.read(name), Place()
    runs = {Path(cell.run.output).name: cell.run for cell in plan.cells(study, place)}
    runs |= {stage.name: plan.stage_run(study, stage, place) for stage in study.stages if stage.train}
    return {name: make.digest(study, run, place) for name, run in runs.items()}


@pytest.mark.parametrize(("name", "result"), RUNS)
def test_results_are_of_the_settings_beside_them(name: str, result: Result) -> None:
    assert result.record["settings"] == digests(name)[result.name]
    assert re.fullmatch(r"[0-9a-f]{40}", result.record["code"])
    assert re.fullmatch(r"[0-9a-f]{40}", result.record["git"])


def test_what_stages_tell_is_of_the_settings_beside_it() -> None:
    studies = [plan.read(name) for name in plan.names()]
    stages = [(study, stage) for study in studies for stage in study.stages if stage.analyse or stage.responses]
    there = [(study, stage) for study, stage in stages if (folder(study.name) / f"{stage.name}.json").is_file()]
    assert {study.name for study, _ in there} >= {"multi30k", "theory"}
    assert [stage.name for study, stage in there if not make.stage_kept(study, stage, Place())] == []


@pytest.mark.parametrize("name", plan.names())
def test_all_runs_begin_with_the_same_students(name: str) -> None:
    everything = {each: (plan.read(each), results.load(folder(each))) for each in (name, *plan.read(name).needs)}
    study, runs = everything[name]
    found: dict[str, set[str]] = {}
    for variant, start in results.starts_of(study, everything).items():
        for run in results.of_variant(runs, variant):
            validation = (start.record["parameters"]["student"], run.record["rows"]["validation"])
            found.setdefault(str(validation), set()).add(json.dumps(run.record["curve"][0][2:]))
    assert [begun for begun in found.values() if len(begun) > 1] == []


def test_all_results_are_of_the_same_code() -> None:
    codes = [values["code"] for _, result in (each.values for each in kept()) if "code" in (values := result.record)]
    assert len(set(codes)) == 1


@pytest.mark.parametrize(("name", "result"), RUNS)
def test_scores_are_those_of_the_rows(name: str, result: Result) -> None:
    metric = plan.read(name).metric
    for data in result.record["statistics"]:
        found = METRICS[metric].score(result.statistics(data, metric).sum(1)).mean()
        assert found == pytest.approx(result.score(data, metric), abs=2e-3)


def test_a_study_is_made_once_and_its_pages_need_nothing_else(
    study: Study, made: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = make.kept_in(study, made)
    names = {"teacher", "student", "responses", "sft_seed-1", "seqkd_seed-1"}
    assert {path.stem for path in where.iterdir()} == names
    before = {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(made.runs).rglob("*") if path.is_file()
    }
    models = Path(made.runs) / "multi30k" / "teacher"
    models.rename(aside := models.with_name("aside"))  # as in a fresh clone
    assert make.make(study, made, Display()) == {}
    aside.rename(models)
    after = {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(made.runs).rglob("*") if path.is_file()
    }
    assert after == before
    assert "train" not in capsys.readouterr().err
    for result in results.load(where).values():
        assert [text for text in texts(result.record) if not PLAIN.fullmatch(text)] == []
    words = "|".join(smoke.WORDS)
    assert not re.search(rf'"[^"]*\b({words}) ({words})\b', (where / "sft_seed-1.json").read_text())
    written = pages.write(tmp_path, lambda name: make.kept_in(plan.read(name), made))
    page = (tmp_path / "multi30k.md").read_text()
    assert "| SeqKD | 1 |" in page
    assert "Not made yet: SFT (seed 2, 3); KD (seed 1, 2, 3); SeqKD (seed 2, 3); " in page
    assert {path.name for path in written} == {f"{name}.md" for name in (*plan.names(), "time", "claims", "index")}
    assert "No run of it is made yet." in (tmp_path / "dolly.md").read_text()


def test_a_run_of_other_settings_is_not_taken_for_the_one_that_is_kept(study: Study, made: Place) -> None:
    cell = next(cell for cell in plan.cells(study, made) if cell.settings["variant"] == "sft")
    digest = make.digest(study, cell.run, made)
    assert json.loads((make.kept_in(study, made) / "sft_seed-1.json").read_text())["settings"] == digest
    moved = cell.run.model_copy(update={"output": "elsewhere"})
    assert make.digest(study, moved, made) == digest
    changed = study.model_copy(update={"settings": {"optim.lr": 1e-5}})
    other = plan.cells(changed, made)[0]
    assert make.digest(changed, other.run, made) != digest
    stages = [s.model_copy(update={"settings": {"seed": 9}} if s.name == "teacher" else {}) for s in study.stages]
    assert make.digest(study.model_copy(update={"stages": stages}), cell.run, made) != digest
    with pytest.raises(ConfigError, match=r"sft_seed-1 holds a run of other settings \(optim.lr=1e-05\); delete"):
        make.keep(changed, made)


def test_results_are_not_added_to_those_of_a_model_that_is_gone(study: Study, made: Place, tmp_path: Path) -> None:
    place = Place(made.rows, str(tmp_path), smoke=True)
    shutil.copytree(make.kept_in(study, made), make.kept_in(study, place))
    shutil.copytree(Path(made.runs) / "multi30k" / "tokenizer", tmp_path / "multi30k" / "tokenizer")
    (make.kept_in(study, place) / "sft_seed-1.json").unlink()
    teacher = next(plan.stage_run(study, stage, place) for stage in study.stages if stage.name == "teacher")
    record = make.kept_in(study, place) / "teacher.json"
    digest = make.digest(study, teacher, place)  # a digest tells where models are, and here they are elsewhere
    record.write_text(results.as_json(json.loads(record.read_text()) | {"settings": digest}))
    with pytest.raises(ConfigError, match=r"teacher is gone, and results that are kept rest on it"):
        make.make(study, place, Display(quiet=True))
    assert not Path(teacher.output).exists()


def test_a_run_that_is_not_whole_is_not_kept(study: Study, made: Place, tmp_path: Path) -> None:
    place = Place(made.rows, str(tmp_path), smoke=True)
    whole = Path(made.runs) / "multi30k" / "sft_seed-1"
    folder = Path(shutil.copytree(whole, tmp_path / "multi30k" / "sft_seed-1"))
    text = (folder / "run.yaml").read_text().replace(made.runs, place.runs)
    (folder / "run.yaml").write_text(text)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if '"kind": "step", "step": 2' not in line))
    make.keep(study, place)
    assert not make.kept_in(study, place).exists()
    (folder / "metrics.jsonl").write_text("".join(lines))
    make.keep(study, place)
    assert [path.name for path in make.kept_in(study, place).iterdir()] == ["sft_seed-1.json"]


def test_a_run_that_fails_is_kept_as_one_and_shown(study: Study, made: Place, tmp_path: Path) -> None:
    failing = study.model_copy(update={"variants": study.variants | {"sft": {"method.name": "sft", "optim.lr": 1e30}}})
    place = Place(made.rows, str(tmp_path), smoke=True)
    for name in ("tokenizer", "teacher", "student"):
        shutil.copytree(Path(made.runs) / "multi30k" / name, tmp_path / "multi30k" / name)
    for path in (tmp_path / "multi30k").glob("*/run.yaml"):
        path.write_text(path.read_text().replace(made.runs, place.runs))
    assert "sft_seed-1" in "".join(make.make(failing, place, Display(quiet=True)))
    kept = results.load(make.kept_in(failing, place))
    assert kept["sft_seed-1"].record["failed"] == 1
    assert results.failed(tmp_path / "never begun", "digest") is None
    assert results.failed(Path(made.runs) / "multi30k" / "sft_seed-1", "digest") is None  # it did not fail
    page = "\n".join(pages.methods_page(failing, kept, tmp_path))
    assert "sft_seed-1 did not come to its end: it failed after step 1." in page
    assert "Not made yet: SFT (seed 2, 3); KD (seed 1, 2, 3); " in page


def test_paths_of_the_files_are_moved_and_nothing_else() -> None:
    place = Place("/rows", "/here", smoke=True)
    given = {
        "a": ["../shared/data/x.jsonl", "../shared/database"],
        "b": {"c": "runs/y"},
        "d": "runsy",
        "e": 3,
        "f": "runs",
    }
    assert place.moved(given) == {
        "a": ["/rows/x.jsonl", "../shared/database"], "b": {"c": "/here/y"}, "d": "runsy", "e": 3, "f": "/here",
    }  # fmt: skip


@pytest.mark.parametrize("name", plan.names())
def test_every_run_of_a_study_has_settings_and_a_folder_of_its_own(name: str) -> None:
    study = plan.read(name)
    cells = plan.cells(study, Place())
    assert len({cell.run.output for cell in cells}) == len(cells)
    digests = [results.settings_digest(cell.run) for cell in cells]
    assert len(set(digests)) == len(digests)
    shown = {variant for axis in study.axes for variant in axis.values.values()}
    assert study.kind != "ablations" or shown == set(study.variants)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"baseline": "kdd"}, "no variant is called kdd"),
        ({"smoke": {"variants": ["sfft"]}}, "no variant is called sfft"),
        ({"stages": [{"name": "a", "train": "x.yaml", "fetch": "y"}]}, "give one of tokenizer"),
        ({"axes": [{"name": "a", "about": "", "values": {"1": "sft"}, "reference": "2"}]}, "its reference 2 is none"),
        ({"sedes": [1]}, "sedes"),
    ],
)
def test_a_mistake_in_a_study_is_named(changes: dict[str, Any], said: str) -> None:
    good = {"name": "s", "title": "t", "about": "a", "base": "b.yaml", "variants": {"sft": {}}, "seeds": [1]}
    good |= {"baseline": "sft", "metric": "bleu"}
    Study(**good)
    with pytest.raises(ValidationError, match=said):
        Study(**(good | changes))


def test_a_mistake_in_a_studys_file_is_an_error_of_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "HERE", tmp_path)
    (tmp_path / "mine").mkdir()
    for text, said in (("seeds: many", "seeds"), ("title: a\ntitle: b", "title")):
        (tmp_path / "mine" / "study.yaml").write_text(text)
        done = CliRunner().invoke(app, ["run", "mine"])
        assert isinstance(done.exception, SystemExit)
        assert "error: " in done.stderr
        assert said in done.stderr


def test_a_model_that_cannot_be_brought_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "MODELS", tmp_path / "fetch.py")
    with pytest.raises(ConfigError, match=r"fetch.py is not here; put the model smollm2 there"):
        make.fetch("smollm2", tmp_path / "smollm2")
    (tmp_path / "fetch.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(ConfigError, match="the model smollm2 could not be brought"):
        make.fetch("smollm2", tmp_path / "smollm2")
    assert [path.name for path in tmp_path.iterdir()] == ["fetch.py"]


def test_an_unknown_study_is_an_error_of_one_line() -> None:
    done = CliRunner().invoke(app, ["run", "multi31k"])
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("error: there is no study multi31k; there are ")
    assert isinstance(done.exception, SystemExit)


def fabricated(name: str, level: float, seconds: float, draw: np.random.Generator) -> Result:
    """A run with ROUGE-L of about ``level`` on 300 rows."""
    values = [round(float(v), 3) for v in draw.normal(level, 4, 300)]
    record = {
        "scores": {"set": {"rouge_l": {"mean": float(np.mean(values)), "std": None}}},
        "statistics": {"set": {"rouge_l": [[values, 1]], "ids": "set:0-299", "num_rows": 300}},
        "method": {"name": name.partition("_")[0]},
        "seconds": seconds,
        "steps": 10,
        "parameters": {"teacher": 2_000_000, "student": 1_000_000},
        "curve": [[0, 0.0, 1.0, 1.0, 5.0], [5, seconds / 2, 1.0, 1.0, 9.0], [10, seconds, 1.0, 1.0, 7.0]],
    }
    return Result(name, record)


@pytest.mark.parametrize(("apart", "verdict"), [(3.0, "held"), (-3.0, "reversed"), (0.0, "open")])
def test_claims_are_decided_by_the_interval(apart: float, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(4)
    study = plan.read("samsum")
    runs = [fabricated(f"kd_seed-{s}", 30 + apart, 9, draw) for s in (1, 2, 3)]
    runs += [fabricated(f"sft_seed-{s}", 30, 30 + s, draw) for s in (1, 2, 3)]
    comparisons = [
        claims.Comparison(studies=["samsum", "absent"], better="kd", than="sft"),
        claims.Comparison(studies=["samsum"], better="kd", than="sft", faster=1),
        claims.Comparison(studies=["samsum"], better="kd", than="sft", faster=3.5),
        claims.Comparison(studies=["samsum"], better="kd", than="sft", faster=4),
        claims.Comparison(studies=["samsum"], better="kd", than="sft", margin=9.0),
        claims.Comparison(studies=["samsum"], better="gkd", than="sft"),
    ]
    monkeypatch.setattr(
        claims, "read", lambda: [claims.Claim(claim="It is so", where="There", comparisons=comparisons)]
    )
    page = "\n".join(claims.page({"samsum": (study, {run.name: run for run in runs})}))
    rows = [line for line in page.splitlines() if line.startswith("| [samsum]")]
    assert [row.split(" | ")[-1].strip(" |") for row in rows] == [verdict, "held", "open", "missed", "held"]
    assert f"{apart:+.0f}"[:2] in rows[0] or verdict == "open"
    assert "| time, the other's at least 3.5 times | 3.56 times |" in rows[2]
    assert "2.0 M into 1.0 M, 10 steps, 3 seeds" in rows[0]


def test_one_seed_decides_nothing_but_a_stage_is_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(4)
    study = plan.read("samsum")
    runs = [fabricated(f"kd_seed-{s}", 40, 9, draw) for s in (1, 2)]
    runs += [fabricated("sft_seed-1", 30, 9, draw), fabricated("student", 30, 9, draw)]
    comparisons = [claims.Comparison(studies=["samsum"], better="kd", than=than) for than in ("sft", "student")]
    monkeypatch.setattr(claims, "read", lambda: [claims.Claim(claim="So", where="There", comparisons=comparisons)])
    page = claims.page({"samsum": (study, {run.name: run for run in runs})})
    one, stage = (line for line in page if line.startswith("| [samsum]"))
    assert one.endswith("1 seed | one seed, for it |")
    assert "‡" not in one
    assert stage.endswith("2 seeds | held |")
    assert "‡" in stage
    assert "| So | 1 | 0 | 0 | 0 | 1 |" in page


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("srkl", "SRKL"),
        ("kl-adaptive-off-policy", "KL, adaptive off-policy"),
        ("rkl-on-policy", "RKL, on-policy"),
        ("jsd-dataset", "JSD, dataset"),
        ("skl-noise-0.1", "SKL, noise 0.1"),
        ("distillm2", "DistiLLM-2"),
        ("student", "the student before"),
        ("skl-0.3", "SKL, skew 0.3"),
        ("phi-0.2", "phi 0.2"),
        ("capacity-256", "capacity 256"),
        ("sft-smaller", "SFT, smaller student"),
        ("srkl-raw", "SRKL, from random weights"),
    ],
)
def test_variants_have_names_for_readers(variant: str, name: str) -> None:
    assert named(variant) == name


def test_what_claims_compare_has_names_for_readers() -> None:
    compared = {v for claim in claims.read() for each in claim.comparisons for v in (each.better, each.than)}
    assert {name for name in map(named, compared) if not re.match(r"[A-Z]|\w*KD|the .*student before", name)} == set()


def test_several_test_sets_count_by_their_rows() -> None:
    draw = np.random.default_rng(4)
    runs = [fabricated("kd_seed-1", 40, 9, draw), fabricated("sft_seed-1", 30, 9, draw)]
    for run, shift in zip(runs, (2, -1), strict=True):
        ((values, one),) = run.record["statistics"]["set"]["rouge_l"]
        other = {"rouge_l": [[[value + shift for value in values[:100]], one]], "ids": "b:0-99", "num_rows": 100}
        run.record["statistics"]["other"] = other
    whole, first = (results.difference(runs[:1], runs[1:], sets, "rouge_l") for sets in (["set", "other"], ["set"]))
    values = [[np.mean(run.statistics(data, "rouge_l")[0, :, 0]) for run in runs] for data in ("set", "other")]
    apart = [a - b for a, b in values]
    assert first.difference == pytest.approx(apart[0])
    assert whole.difference == pytest.approx((300 * apart[0] + 100 * apart[1]) / 400)
    together = [results.pooled(run, ["set", "other"], "rouge_l") for run in runs]
    assert together[0] - together[1] == pytest.approx(whole.difference)
    groups = {"kd": runs[:1], "sft": runs[1:]}
    for run in runs:
        run.record["scores"]["other"] = run.record["scores"]["set"]
        run.record.update(
            {"batches": {"dataset": 1, "generated": 0, "replayed": 0}, "probability": None, "kept_step": 5}
        )
    study = plan.read("samsum")
    all_sets = pages._scores(study, groups, {run.name: run for run in runs}, ["set", "other"])
    assert f"| KD | 1 | {together[0]:.2f} | {whole.difference:+.2f} [" in all_sets[2]
    assert "minutes" in all_sets[0]
    assert "minutes" not in pages._scores(study, groups, {run.name: run for run in runs}, ["set"], alone=False)[0]


def test_what_slowed_a_run_down_is_taken_out(tmp_path: Path) -> None:
    quick = {"parameters": {"student": 5}, "tokens": 100, "seconds": 8.0, "curve": [[0, 0.0, 1], [4, 8.0, 1]]}
    quick["parts"] = {"student backward": 4.0, "generation": 2.0}
    slow = quick | {"tokens": 200, "seconds": 30.0, "parts": {"student backward": 24.0, "generation": 3.0}}
    slow["curve"] = [[0, 0.0, 1], [4, 30.0, 1]]
    larger = slow | {"parameters": {"student": 9}}
    for name, record in {"a_seed-1": quick, "b_seed-1": slow, "teacher": larger, "responses": {"rows": 3}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    found = results.load(tmp_path)
    assert {name: run.slowdown for name, run in found.items()} == {
        "a_seed-1": 1.0, "b_seed-1": 3.0, "teacher": 1.0, "responses": 1.0,
    }  # fmt: skip
    run = found["b_seed-1"]
    assert (run.seconds, run.parts["generation"], run.curve[1][:2]) == (10.0, 1.0, [4, 10.0])


def test_equal_time_takes_the_best_validation_until_then() -> None:
    run = fabricated("kd_seed-1", 30, 20, np.random.default_rng(0))
    assert pages.reached_by(run, 20.0) == (10, 9.0)
    assert pages.reached_by(run, 19.9) == (5, 9.0)
    assert pages.reached_by(run, 9.0) == (0, None)  # what it started from is not its own
