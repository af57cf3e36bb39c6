"""The examples of the documentation run as they are written."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from distillm.config import as_yaml, make_run
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
    (tree,) = re.findall(r"    src/distillm/\n((?:      .*\n)+)", text)
    named = [name for line in tree.splitlines() for name in re.findall(r"\b[a-z_]+(?:\.py|/)(?=\s)", line)]
    assert len(named) > 15
    assert [name for name in named if not (ROOT / "src" / "distillm" / name).exists()] == []
