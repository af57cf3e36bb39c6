"""The wheel and the sdist hold all that is needed, and the wheel works where it alone is installed."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from distillm import __version__
from distillm.config import recipes

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "distillm"
# Without the sources on the path: what is tested is what was installed.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, check=False, cwd=cwd, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build", reason="needs the package build, of the extra dev")
    target = tmp_path_factory.mktemp("built")
    # Without hatchling at hand, build fetches it into an environment of its own.
    isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    run(sys.executable, "-m", "build", *isolation, "--outdir", target, ROOT, cwd=target)
    return target


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module", params=["*.whl", "*.tar.gz"], ids=["wheel", "sdist"])
def python(request: pytest.FixtureRequest, built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with distillm from what was built and, so that nothing is downloaded, our other packages."""
    (package,) = built.glob(request.param)
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    )
    # The parent's own installation is visible from there, and must not count as the one that is asked for.
    run(*pip, "--disable-pip-version-check", "--ignore-installed", package, cwd=home)
    return python


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        f"distillm/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == wanted
    for name in ("py.typed", "recipes/demo.yaml", "report/page.html.j2", "demo/prompts_test.jsonl"):
        assert f"distillm/{name}" in names


def test_the_wheel_says_who_it_is_and_holds_the_licence(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        facts = message_from_string(archive.read(name).decode())
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert (facts["Name"], facts["Version"]) == ("distillm", __version__)
    assert facts["License-Expression"] == "Apache-2.0"
    assert set(facts.get_all("Provides-Extra", [])) >= {"lora", "judge", "docs", "bench"}


def test_the_sdist_holds_what_building_and_testing_elsewhere_needs(built: Path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "src/distillm/cli/__init__.py",
        "tests/tiny.py",
        "docs/architecture.md",
    ):
        assert name in names
    assert not [name for name in names if name.startswith((".git/", "runs/", "dist/"))]


def test_the_installed_package_is_the_one_from_the_wheel_and_finds_its_data(python: Path, tmp_path: Path):
    assert Path(run(python, "-c", "import distillm; print(distillm.__file__)", cwd=tmp_path).strip()).is_relative_to(
        python.parents[1]
    )
    command = python.with_name("distillm")
    assert run(command, "--version", cwd=tmp_path) == f"distillm {__version__}\n"
    assert run(python, "-m", "distillm", "--version", cwd=tmp_path) == f"distillm {__version__}\n"
    listed = run(command, "recipes", cwd=tmp_path)
    assert [line.split()[0] for line in listed.splitlines()] == sorted(recipes())
    assert "student:" in run(command, "recipes", "show", "demo", cwd=tmp_path)
    assert "task translation" in run(command, "datasets", cwd=tmp_path)


def test_the_installed_package_writes_a_report(python: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("output: run\n")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "loss": 2.0}\n')
    run(python.with_name("distillm"), "report", "run", cwd=tmp_path)
    assert "</html>" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_wheel_brings_all_that_it_needs(wheel: Path, tmp_path: Path):
    """Nothing comes from the parent here: pip installs the requirements that the wheel declares."""
    venv.create(tmp_path / "alone", with_pip=True)
    python = tmp_path / "alone" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    code = "import distillm; [getattr(distillm, name) for name in dir(distillm)]; import distillm.cli, distillm.demo"
    run(python, "-c", code, cwd=tmp_path)
