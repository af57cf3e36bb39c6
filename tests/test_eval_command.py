"""``distillm eval``: several data sets at once, metrics by name, what is refused before a model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from command_line import distillm, done, refused
from distillm.config import as_yaml
from distillm.evaluation import score_texts
from tiny_run import materials, rows, scores, tiny_run, write_rows

METRICS = "bleu,chrf,ter,rouge_1,distinct_2,repetition,length_ratio"
TEMPLATE = ("--template", "Q: {{ instruction }}\nA: ", "--max-new-tokens", 4, "--seeds", "1,2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = materials(tmp_path_factory.mktemp("materials"))
    write_rows(found / "more.jsonl", [{"instruction": "Say it.", "output": ["it", "that it is"]}, *rows(1, 70)])
    return found


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A finished run that never trained: its student is the one it started from."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.yaml").write_text(as_yaml(tiny_run(made, folder)), encoding="utf-8")
    (folder / "student").symlink_to(made / "student")
    return folder


def data(made: Path, *names: str) -> list[object]:
    return [part for name in names for part in ("--data", made / f"{name}.jsonl")]


def test_several_data_sets_are_scored_by_one_loaded_model(made: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
    from distillm import loading

    loaded = list[object]()
    load = loading.load_models
    monkeypatch.setattr(loading, "load_models", lambda *given: loaded.append(given) or load(*given))
    said = done("eval", run, *data(made, "test", "more"), "--metrics", METRICS)
    assert len(loaded) == 1
    found = scores(run)
    assert list(found) == ["more-student.json", "test-student.json"]
    for name, count in (("test", 3), ("more", 2)):
        result = found[f"{name}-student.json"]
        assert (result["data"], result["system"], result["model"], result["num_rows"]) == (
            name,
            "student",
            str(run),
            count,
        )
        told = {"response_tokens", "truncated", "divergence", "agreement", "perplexity", "calibration_error"}
        assert result["scores"].keys() == {*METRICS.split(","), *told}
        assert result["signatures"].keys() == {"bleu", "chrf", "ter"}
        kept = result["predictions"]
        for seed in range(2):
            texts = [row["predictions"][seed] for row in kept]
            again = score_texts(texts, [row["references"] for row in kept], METRICS.split(","))
            assert {name: result["scores"][name]["per_seed"][seed] for name in again} == again
        assert f"{name}: {count} rows, 2 seed(s)" in said
        assert f"bleu: {result['signatures']['bleu']}" in said
    assert "nrefs:var" in found["more-student.json"]["signatures"]["bleu"]
    assert "nrefs:1|" in found["test-student.json"]["signatures"]["bleu"]


def test_scores_that_are_there_are_not_replaced(made: Path, run: Path):
    (run / "eval").mkdir()
    (run / "eval" / "more-student.json").write_text("{}")
    for names, instead in ((("test", "more"), "--output FOLDER, or delete them"), (("more",), "--output FILE")):
        said = distillm("eval", run, *data(made, *names))
        assert said.code == 2
        assert f"more-student.json holds scores already; give {instead}" in said.err
        assert "rows used" not in said.err
    assert [path.name for path in (run / "eval").iterdir()] == ["more-student.json"]


def test_several_data_sets_go_to_the_folder_that_is_named(made: Path, tmp_path: Path):
    target = tmp_path / "new" / "scores"
    done("eval", made / "student", *data(made, "test", "more"), *TEMPLATE, "--output", target)
    assert sorted(path.name for path in target.iterdir()) == ["more-student.json", "test-student.json"]
    result = json.loads((target / "test-student.json").read_text())
    assert {"rouge_l", "exact_match", "perplexity", "calibration_error"} <= result["scores"].keys()
    assert not {"divergence", "agreement"} & result["scores"].keys()  # there is no teacher
    assert "signatures" not in result
    assert "holds scores already" in refused("eval", made / "student", *data(made, "test", "more"), "--output", target)


def test_data_sets_are_named_by_the_user_or_known_by_name(made: Path, tmp_path: Path):
    for name in ("dolly", "vicuna"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "test.jsonl", rows(2, 30 if name == "dolly" else 50))
    target = tmp_path / "scores"
    asked = [
        "--data",
        "dolly",
        "--data",
        f"own={tmp_path / 'vicuna' / 'test.jsonl'}",
        "--data",
        f"other={made / 'test.jsonl'}",
    ]
    done("eval", made / "student", *asked, "--folder", tmp_path, *TEMPLATE, "--output", target)
    found = {path.name: json.loads(path.read_text()) for path in target.iterdir()}
    assert {name: (result["data"], result["num_rows"]) for name, result in found.items()} == {
        "dolly-student.json": ("dolly", 2),
        "own-student.json": ("own", 2),
        "other-student.json": ("other", 3),
    }


def test_the_teacher_of_a_run_is_scored_on_request(made: Path, run: Path):
    done("eval", run, *data(made, "test"), "--system", "teacher", "--seeds", 1)
    (result,) = scores(run).values()
    assert (result["system"], result["model"]) == ("teacher", str(made / "teacher"))
    assert {"perplexity", "calibration_error"} <= result["scores"].keys()
    assert not {"divergence", "agreement"} & result["scores"].keys()
    assert (run / "eval" / "test-teacher.json").is_file()
    done("eval", made / "teacher", *data(made, "test"), *TEMPLATE, "--seeds", 1, "--output", run / "own.json")
    own = json.loads((run / "own.json").read_text())
    for name in ("perplexity", "calibration_error", "rouge_l"):
        assert own["scores"][name]["mean"] == pytest.approx(result["scores"][name]["mean"], rel=1e-5), name


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (("test", "bad"), [], "bad.jsonl:1: not valid JSON"),
        (("test", "bare"), [], "bare:0 has no reference to score against: no field 'output'"),
        (("test", "test"), [], "two --data are called test"),
        (("test", "nowhere"), [], "nowhere.jsonl"),
        (("test",), ["--metrics", "rouge_l,blue"], "there is no metric 'blue'; did you mean bleu?"),
        (("test",), ["--metrics", ""], "there is no metric ''"),
        (("test",), ["--system", "teacher"], "the run has no teacher to score"),
        (("test",), ["--system", "uncle"], "--system uncle: give student or teacher"),
    ],
)
def test_what_cannot_be_scored_is_said_before_the_model_is_loaded(
    made: Path, names: tuple[str, ...], options: list[str], said: str, monkeypatch: pytest.MonkeyPatch
):
    def load(*_: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("distillm.loading.load_models", load)
    (made / "bad.jsonl").write_text("{]\n")
    write_rows(made / "bare.jsonl", rows(2, output=False))
    assert said in refused("eval", made / "student", *data(made, *names), *options)


def test_given_predictions_take_metrics_too(tmp_path: Path):
    path = write_rows(tmp_path / "p.jsonl", [{"prediction": "a b c d e", "references": ["a b c d e", "f"]}])
    said = done("eval", "--predictions", path, "--metrics", "bleu,rouge_lsum", "--output", tmp_path / "s.json")
    assert "bleu: nrefs:2|case:mixed" in said
    found = json.loads((tmp_path / "s.json").read_text())
    assert {name: score["mean"] for name, score in found["scores"].items()} == {
        "bleu": pytest.approx(100),
        "rouge_lsum": pytest.approx(100),
    }
    assert "no metric 'blue'" in refused("eval", "--predictions", path, "--metrics", "blue")
    assert "of the other options only --output and --metrics" in refused(
        "eval", "--predictions", path, "--system", "teacher"
    )


def test_a_run_says_its_metrics_itself(made: Path, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    text = as_yaml(tiny_run(made, folder, {"evaluation.metrics": ["chrf"]}))
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    (folder / "student").symlink_to(made / "student")
    done("eval", folder, *data(made, "test"), "--seeds", 1)
    (result,) = scores(folder).values()
    assert "chrf" in result["scores"]
    assert "rouge_l" not in result["scores"]


@pytest.mark.parametrize(("given", "said"), [(["blue"], "bleu"), ([], "at least 1")])
def test_a_configuration_with_an_unknown_metric_is_refused(made: Path, tmp_path: Path, given: list[str], said: str):
    from distillm.errors import ConfigError

    with pytest.raises(ConfigError, match=r"evaluation\.metrics") as caught:
        tiny_run(made, tmp_path / "run", {"evaluation.metrics": given})
    assert said in str(caught.value)
