"""Runs in a notebook: frames that hold what the files hold, figures that hold what the report draws."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

import distillm
from distillm.errors import ConfigError, DataError
from distillm.report.charts import run_charts
from distillm.report.frames import RunLog, plot, read_run
from distillm.report.read import read_runs
from fabricated_run import CONFIG, evaluation, fabricate, write_lines
from report_page import Page, records
from test_security_output import HOSTILE, hostile_run
from tiny_run import materials, tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate(tmp_path_factory.mktemp("runs") / "kitchen")


@pytest.fixture(scope="module")
def run(folder: Path) -> RunLog:
    return read_run(folder)


def test_the_frames_hold_what_the_files_hold(run: RunLog, folder: Path):
    written = records(folder / "metrics.jsonl", "step")
    assert run.steps.index.name == "step"
    assert run.steps.index.tolist() == [record["step"] for record in written]
    for name in ("loss", "lr", "tokens", "probability", "buffer"):
        assert run.steps[name].tolist() == [record[name] for record in written]
    assert run.steps["terms.text"].tolist() == [record["terms"]["text"] for record in written]
    assert run.steps["buffer_age"].isna().sum() == sum(record["buffer_age"] is None for record in written)
    validations = records(folder / "metrics.jsonl", "validation")
    assert run.validations["divergence"].tolist() == [record["divergence"] for record in validations]
    assert run.events.columns.tolist() == ["step", "event", "message"]
    assert len(run.samples) == len((folder / "samples.jsonl").read_text().splitlines())
    assert run.config == CONFIG
    one = run.scores[(run.scores["system"] == "student") & (run.scores["score"] == "rouge_l")].iloc[0]
    assert (one["data"], one["mean"], one["std"], one["seeds"], one["rows"]) == ("kitchen-test", 29.7031, 0.4137, 3, 60)


def test_a_run_that_recorded_nothing_has_empty_frames(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    run = read_run(tmp_path)
    frames: list[pd.DataFrame] = [run.steps, run.validations, run.events, run.times, run.samples, run.scores]
    assert all(frame.empty for frame in frames)
    assert any("No training step" in note for note in run.notes)
    with pytest.raises(ConfigError, match="'loss'; there is nothing yet"):
        plot(run)
    with pytest.raises(DataError, match="does not exist"):
        read_run(tmp_path / "absent")


def test_a_figure_has_the_series_of_the_report(run: RunLog, folder: Path):
    for chart in run_charts(read_runs([folder])[0], "run", 2000):
        figure = plot(run, chart.id.removeprefix("run-")).to_dict()
        assert figure["layout"]["title"]["text"] == chart.title
        assert [list(trace["x"]) for trace in figure["data"]] == [series.x for series in chart.series]
        assert [list(trace["y"]) for trace in figure["data"]] == [series.y for series in chart.series]
        assert {trace["type"] for trace in figure["data"]} == {"bar" if chart.kind == "bar" else "scatter"}
    assert len(plot(run, "validation").to_dict()["layout"]["annotations"]) == 1  # the best step


def test_several_runs_are_laid_over_one_another(run: RunLog, folder: Path, tmp_path: Path):
    other = fabricate(tmp_path / "other", num_steps=60, every=20)
    both = plot([run, str(other)], "divergence").to_dict()["data"]
    assert [trace["name"] for trace in both] == ["kitchen", "other"]
    assert both[1]["x"][-1] == 60
    losses = plot([folder, other], "loss").to_dict()["data"]
    assert [trace["name"] for trace in losses] == ["kitchen", "other"]  # smooth alone
    assert len({trace["line"]["color"] for trace in losses}) == 2
    terms = plot([folder, other], "terms").to_dict()["data"]
    assert [trace["name"] for trace in terms] == [
        "kitchen · distill", "kitchen · text", "other · distill", "other · text",
    ]  # fmt: skip
    cost = plot([folder, other], "time-divergence").to_dict()
    assert [(trace["name"], trace["mode"]) for trace in cost["data"]] == [("kitchen", "markers"), ("other", "markers")]
    assert cost["layout"]["xaxis"]["title"]["text"] == "training time (s)"
    with pytest.raises(ConfigError, match="one run alone"):
        plot([folder, other], "origins")


def test_what_there_is_no_chart_of_is_named(run: RunLog):
    with pytest.raises(ConfigError, match="'speed'; there is loss, terms, validation") as refused:
        plot(run, "speed")
    for name in str(refused.value).partition("there is ")[2].rpartition("there is ")[2].split(", "):
        assert plot(run, name).to_dict()["data"]


@pytest.mark.parametrize("evil", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_in_what_a_notebook_shows_comes_alive(tmp_path: Path, evil: str):
    run = read_run(hostile_run(tmp_path / "run", evil))
    page = Page(run._repr_html_())
    assert {tag for tag, _ in page.elements} == {"table", "caption", "tbody", "tr", "th", "td"}
    assert "\x1b" not in repr(run)
    shown = json.dumps([plot(run, what).to_dict() for what in ("terms", "origins")], default=list)
    assert "<script" not in shown.lower()
    assert "<a " not in shown


def test_a_figure_is_drawn_in_a_notebook_without_a_network(run: RunLog):
    import plotly.io

    figure = plot(run, "loss")
    bundle: dict[str, Any] = plotly.io.renderers["plotly_mimetype"].to_mimebundle(figure.to_dict())
    assert bundle.keys() == {"application/vnd.plotly.v1+json"}  # what JupyterLab's extension draws
    inside = plotly.io.to_html(figure, include_plotlyjs=True, full_html=False)
    assert 'src="http' not in inside


def test_steps_and_projects_print_well(tmp_path: Path):
    project = distillm.build(tiny_run(materials(tmp_path), tmp_path / "run", {"train.steps": 2, "validation.every": 1}))
    said = repr(project)
    assert "method: distillm" in said
    assert "rows: 12 train, 4 validation, 3 numbers" in said
    assert "step: 0 of 2, validated every 1" in said
    assert len(said.splitlines()) < 10
    assert Page(project._repr_html_()).all("td")[0] == "distillm"
    step = next(distillm.steps(project))
    assert "Example(" not in repr(step)
    page = Page(step._repr_html_())
    assert page.all("caption")[0].startswith("step 1, ")
    assert dict(zip(page.all("th"), page.all("td"), strict=True))["loss"] == f"{step.loss:.4g}"


def test_reading_a_run_does_not_load_torch(folder: Path):
    script = f"import sys, distillm\nassert len(distillm.read_run({str(folder)!r}).steps) == 120\n"
    script += "assert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# -------------------------------------------------------------------------------------------------------- the notebook

NOTEBOOK = Path(__file__).parents[1] / "examples" / "distil_in_a_notebook.ipynb"


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_is_kept_without_outputs():
    for cell in cells():
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


def test_the_cells_of_the_notebook_run_in_order(capsys: pytest.CaptureFixture[str]):
    code = ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for source in code:
        shorter = source.replace('"steps": 120', '"steps": 4').replace('"steps": 60', '"steps": 20')
        exec(shorter, names)
    assert "step 20: loss" in capsys.readouterr().out
    assert [run.steps.index[-1] for run in names["runs"]] == [20, 20]
    assert sum(source.count('"steps": ') for source in code) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the kernel's own machinery
def test_the_notebook_runs_in_a_kernel_and_shows_its_tables_and_plots():
    for name in ("nbclient", "ipykernel"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}, of the extra dev")
    import nbclient
    import nbformat

    book = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()
    shown = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert not [output for output in shown if output["output_type"] == "error"]
    said = "".join(output["text"] for output in shown if output.get("name") == "stderr")
    assert said == "" or "IProgress" in said  # tqdm's, where no widgets are installed
    kinds = [output["data"].keys() for output in shown if "data" in output]
    assert sum("application/vnd.plotly.v1+json" in kind for kind in kinds) == 2
    assert sum("text/html" in kind for kind in kinds) >= 5


def test_scores_of_a_data_set_without_rows(tmp_path: Path):
    (tmp_path / "eval").mkdir()
    write_lines(tmp_path / "metrics.jsonl", [])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    bare = {key: value for key, value in evaluation("student", 1.0, 2.0).items() if key != "num_rows"}
    (tmp_path / "eval" / "x-student.json").write_text(json.dumps(bare))
    assert read_run(tmp_path).scores["rows"].isna().all()
