"""The examples of the documentation run as they are written."""

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from typer.testing import CliRunner

from distillm.cli import app
from distillm.config import as_yaml, load_run, make_run
from distillm.method_settings import Method
from distillm.methods import METHODS
from tiny_run import materials, tiny_run

ROOT = Path(__file__).parents[1]


def test_the_api_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(as_yaml(tiny_run(materials(tmp_path), tmp_path / "out")), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["api.py", str(tmp_path / "run.yaml"), "train.steps=3"])
    runpy.run_path(str(ROOT / "examples" / "api.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("step")] == ["1", "2", "3"]
    assert "divergence" in shown
    assert (tmp_path / "out" / "student" / "model.safetensors").exists()


def test_the_yaml_of_the_readme_is_valid() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    run = make_run(yaml.safe_load(block))
    assert run.output == "runs/mine"


def test_the_readme_names_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    modules, documents = re.findall(r"`([a-z_]+\.py)`", text), re.findall(r"\b((?:docs/)[\w/-]+\.md)\b", text)
    assert len(modules) > 5
    assert len(documents) > 8
    paths = [*(ROOT / "src" / "distillm" / name for name in modules), *(ROOT / name for name in documents)]
    assert [path for path in paths if not path.is_file()] == []


def test_the_example_of_a_divergence_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(as_yaml(tiny_run(materials(tmp_path), tmp_path / "out")), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["custom_divergence.py", str(tmp_path / "run.yaml"), "data.text=null"])
    found = runpy.run_path(str(ROOT / "examples" / "custom_divergence.py"), run_name="__main__")
    values = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(values) == 8
    assert all(0 < value < 1 for value in values)
    pair = [x.log_softmax(-1) for x in torch.randn(2, 3, 5, dtype=torch.float64)]
    assert (found["hellinger"](*pair) > 0).all()
    torch.testing.assert_close(found["hellinger"](pair[0], pair[0]), torch.zeros(3, dtype=torch.float64))
    pair = [x.requires_grad_() for x in pair]
    assert torch.autograd.gradcheck(found["hellinger"], pair)


PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
SETTINGS = {section.model_fields["name"].default: section for section in get_args(get_args(Method)[0])}


def test_every_method_has_a_page() -> None:
    assert set(SETTINGS) == set(METHODS)
    assert {page.stem for page in PAGES} == {*METHODS, "index"}


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "index"], ids=lambda page: page.stem)
def test_the_command_of_each_methods_page_runs_and_its_settings_are_all_there(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page.read_text(encoding="utf-8")
    (command,) = re.findall(r"^    distillm (train .*)$", text, re.MULTILINE)
    whole = tiny_run(materials(tmp_path), tmp_path / "unused", {"data.text": None, "train.steps": 2})
    (tmp_path / "run.yaml").write_text(as_yaml(whole), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.output
    assert load_run(f"runs/{page.stem}").method.name == page.stem
    fields = {name: field for name, field in SETTINGS[page.stem].model_fields.items() if name != "name"}
    table = dict(re.findall(r"^\| `(\w+)` \| (.*?) \| ", text, re.MULTILINE))
    if table:
        assert table.keys() == fields.keys()
        for name, field in fields.items():
            shown = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
            assert table[name] == ("" if field.default is None else f"`{shown}`")
    else:
        own = {n: f.default for n, f in fields.items() if f.default != getattr(SETTINGS["kd"](), n, None)}
        said = dict(re.findall(r"`(\w+): (\w+)`", text.partition("with other defaults:")[2]))
        assert said == own
