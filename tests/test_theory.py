"""The theory's figures against closed forms, enumeration and autograd; `distillm analyse` on a run leaves it alone."""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from distillm import analyse, theory
from distillm.cli import app
from distillm.config import load_run
from distillm.divergences import DIVERGENCES
from distillm.errors import ConfigError
from distillm.pipeline import distill
from tiny_run import Heard, materials, tiny_run


def pair(size: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    return theory.synthetic_pair(size, 1.5, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("name", theory.COEFFICIENTS)
def test_a_coefficient_is_the_slope_in_the_students_probability(name: str, alpha: float) -> None:
    p, q = pair()
    q.requires_grad_()
    skewed = name in theory.SKEWED
    DIVERGENCES[name](p.log(), q.log(), **({"alpha": alpha} if skewed else {})).backward()
    assert q.grad is not None
    torch.testing.assert_close(theory.gradient_coefficient(name, p, q.detach(), alpha), q.grad)


def test_coefficients_have_their_published_limits() -> None:
    p, q = torch.tensor([1.0, 1e-12], dtype=torch.float64), torch.tensor([1e-12, 1.0], dtype=torch.float64)
    steep = theory.gradient_coefficient("skew_kl", p, q, 0.1)
    assert float(steep[0]) == pytest.approx(-9, rel=1e-9)
    assert float(theory.gradient_coefficient("skew_reverse_kl", p, q, 0.1)[1]) == pytest.approx(math.log(10))
    assert float(theory.gradient_coefficient("forward_kl", p, q)[0]) == pytest.approx(-1e12)
    with pytest.raises(ValueError, match="no coefficient is known of 'jsd'"):
        theory.gradient_coefficient("jsd", p, q)


def enumerated(name: str, p: torch.Tensor, q: torch.Tensor, alpha: float, n: int) -> float:
    """The expected squared error, summed over every pair of samples."""
    true = DIVERGENCES[name](p.log(), q.log(), alpha=alpha)
    total = 0.0
    draws = list(itertools.product(range(len(p)), repeat=n))
    for a, b in itertools.product(draws, draws):
        weight = math.prod(float(p[i]) for i in a) * math.prod(float(q[i]) for i in b)
        p_n, q_n = (torch.tensor(x).bincount(minlength=len(p)).double() / n for x in (a, b))
        total += weight * float(DIVERGENCES[name](p_n.log(), q_n.log(), alpha=alpha) - true) ** 2
    return total


@pytest.mark.parametrize("name", theory.SKEWED)
def test_the_error_of_an_estimator_is_its_expectation(name: str) -> None:
    p, q = pair(3)
    for n in (1, 2):
        exact = enumerated(name, p, q, 0.2, n)
        found = theory.estimator_error(name, p, q, 0.2, n, 40_000, torch.Generator().manual_seed(0))
        assert found == pytest.approx(exact, rel=0.03)


def test_the_bound_is_theorem_one_with_constants_of_one() -> None:
    p, q = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.25, 0.75], dtype=torch.float64)
    chi = 0.0625 / 0.25 + 0.0625 / 0.75
    expected = chi**2 / 0.9**2 / 100 + math.log(1.0) ** 2 / 10 + math.log(10) ** 2 / (0.01 * 10)
    assert theory.error_bound(p, q, 0.1, 10) == pytest.approx(expected)
    assert theory.normalized(0.1, 0.81) == pytest.approx(1.0)


def test_training_without_skew_has_the_gradient_of_the_kl() -> None:
    (norm,) = theory.synthetic_training("skew_kl", 0.0, steps=1, batch=64, size=5, sharpness=2.0, rate=0.1, seed=3)
    generator = torch.Generator().manual_seed(3)
    p, z = (2.0 * torch.randn(64, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    assert norm == pytest.approx(float((z.softmax(-1) - p.softmax(-1)).norm()) / 64)
    norms = theory.synthetic_training("skew_kl", 0.1, steps=300, batch=64, size=5, sharpness=2.0, rate=40.0, seed=3)
    assert norms[-1] < norms[0] / 5


def test_mean_and_variance() -> None:
    assert theory.mean_and_variance([1.0, 3.0]) == (2.0, 1.0)


def test_synthetic_analysis_is_written_as_numbers_and_plots(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["analyse", "-o", str(tmp_path / "a")])
    assert result.exit_code == 0, result.output
    names = {"analysis.json", "coefficients.svg", "errors.svg", "gradients.svg"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == names
    found = json.loads((tmp_path / "a" / "analysis.json").read_text(encoding="utf-8"))
    assert len(found["errors"]) == 2 * 7 * 5
    # More samples, less error; and at many samples the skewed estimators are the better ones, a = 0.1 among the best.
    by_size = [e["squared_error"] for e in found["errors"] if e["divergence"] == "skew_kl" and e["alpha"] == 0.1]
    assert by_size[-1] < by_size[0] / 10
    assert all(math.isfinite(g["variance"]) for g in found["gradients"])
    analyse.write_analysis(found, tmp_path / "b")
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_numbers_in_the_documents_are_those_of_the_command() -> None:
    documents = Path(__file__).parents[1] / "docs" / "analysis"
    written = json.loads((documents / "analysis.json").read_text(encoding="utf-8"))
    found = analyse.analyse_synthetic()
    assert written["settings"] == found["settings"]
    tolerances = {"coefficients": 1e-9, "gradients": 1e-3, "errors": 1.0}  # draws may differ between processors
    for part, tolerance in tolerances.items():
        for one, other in zip(written[part], found[part], strict=True):
            assert one == {k: pytest.approx(v, rel=tolerance) if isinstance(v, float) else v for k, v in other.items()}
    for name in ("coefficients", "errors", "gradients"):
        assert f"analysis/{name}.svg" in (documents.parent / "analysis.md").read_text(encoding="utf-8")
        assert (documents / f"{name}.svg").is_file()


@pytest.fixture(name="run", scope="module")
def _run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = materials(tmp_path_factory.mktemp("made"))
    changes: dict[str, Any] = {"train.steps": 4, "validation.every": 2, "data.text": None}
    return distill(tiny_run(made, tmp_path_factory.mktemp("run") / "run", changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_is_analysed_at_its_checkpoints_and_left_as_it_was(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    found = analyse.analyse_run(str(run), Heard(), batches=3, alphas=(0.0, 0.1))
    assert contents(run) == before
    moved = shutil.copytree(run, tmp_path / "moved")
    elsewhere = analyse.analyse_run(str(moved), Heard(), batches=3, alphas=(0.0, 0.1))
    assert elsewhere["gradients"] == found["gradients"]
    assert found["settings"]["checkpoints"] == [0, 2, 4]
    assert len(found["gradients"]) == 3 * 2 * 2
    assert len(found["coefficients"]) == 3 * 4 * len(analyse.PERCENTILES)
    assert all(row["mean"] > 0 for row in found["gradients"])
    paths = analyse.write_analysis(found, tmp_path)
    assert [path.name for path in paths] == ["analysis.json", "coefficients.svg", "gradients.svg"]


def test_the_gradients_of_a_run_are_those_of_its_steps(run: Path, tmp_path: Path) -> None:
    found = analyse.analyse_run(str(run), Heard(), batches=2, alphas=(0.1,))
    at_start = next(row for row in found["gradients"] if row["step"] == 0 and row["divergence"] == "skew_kl")
    changes = ["output=" + str(tmp_path / "run"), "method={name: distillm, sampling: none}", "student.dropout=0"]
    folder = distill(load_run(str(run), [*changes, "train.max_grad_norm=.inf", "optim.lr=1e-12"]))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    norms = [entry["grad_norm"] for entry in steps if entry["kind"] == "step"][:2]
    assert at_start["mean"] == pytest.approx(sum(norms) / 2, rel=1e-4)


def test_a_run_without_a_teacher_is_refused(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text("student: {path: s}\nmethod: {name: sft}\ndata: {train: x}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="has no teacher"):
        analyse.analyse_run(str(path), Heard())
