"""`distillm analyse`: the theory's figures, from synthetic distributions or from a run's own models."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import theory
from .checkpoint import list_checkpoints, load_student, step_of
from .config import Run, load_run
from .display import Display
from .errors import ConfigError
from .heads import eval_mode
from .kernels import logits
from .losses import distill
from .paths import is_file
from .project import Project, build
from .sources import dataset
from .train import micro_batches
from .types import State
from .writing import write_text

ALPHAS = (0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9)
SAMPLES = (10, 30, 100, 300, 1000)
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
RATIOS = tuple(10 ** (x / 4) for x in range(-16, 17))

Found = dict[str, Any]


def analyse_synthetic(*, size: int = 50, sharpness: float = 2.0, trials: int = 400, seed: int = 0) -> Found:
    """Coefficients by p / q, errors of estimators by skew and sample size, gradients while fitting."""
    generator = torch.Generator().manual_seed(seed)
    p, q = theory.synthetic_pair(size, sharpness, generator)
    skews = [alpha for alpha in ALPHAS if alpha > 0]
    errors = [
        {"divergence": name, "alpha": alpha, "samples": n, "squared_error": error, "bound": bound}
        | {"normalized": theory.normalized(alpha, error), "normalized_bound": theory.normalized(alpha, bound)}
        for name in theory.SKEWED
        for alpha in skews
        for n in SAMPLES
        for error in [theory.estimator_error(name, p, q, alpha, n, trials, generator)]
        for bound in [theory.error_bound(p, q, alpha, n)]
    ]
    training: list[Found] = []
    for name in theory.SKEWED:
        for alpha in ALPHAS:
            norms = theory.synthetic_training(
                name, alpha, steps=200, batch=8, size=size, sharpness=sharpness, rate=0.5, seed=seed
            )
            for at in range(0, 200, 40):
                mean, variance = theory.mean_and_variance(norms[at : at + 40])
                training.append({"divergence": name, "alpha": alpha, "step": at, "mean": mean, "variance": variance})
    settings = {"size": size, "sharpness": sharpness, "trials": trials, "seed": seed}
    return {"of": "synthetic distributions", "settings": settings, "coefficients": _by_ratio()} | {
        "errors": errors,
        "gradients": training,
    }


def _by_ratio() -> list[Found]:
    """The coefficients where q = 0.01 and p is more or less likely."""
    q = torch.full((len(RATIOS),), 0.01, dtype=torch.float64)
    p = q * torch.tensor(RATIOS, dtype=torch.float64)
    rows: list[Found] = []
    for name in theory.COEFFICIENTS:
        values = theory.gradient_coefficient(name, p, q).tolist()
        rows += [{"divergence": name, "ratio": r, "coefficient": v} for r, v in zip(RATIOS, values, strict=True)]
    return rows


def analyse_run(source: str, display: Display, *, batches: int = 16, alphas: Sequence[float] = ALPHAS) -> Found:
    """Of a run: coefficients at its validation tokens, and gradients at its checkpoints for several skews.

    Nothing of the run is changed: its weights are read, and no step is made.

    Raises:
        ConfigError: the run has no teacher.
    """
    run = load_run(source)
    if is_file(Path(source) / "run.yaml"):  # which may have been moved since
        run = run.model_copy(update={"output": source})
    if run.teacher is None:
        raise ConfigError(f"{source} has no teacher, and the theory is about what a teacher and a student say")
    project = without_a_trace(run, display)
    folder = Path(run.output)
    stages: list[tuple[int, Path | None]] = [(0, None)]
    stages += [(step_of(checkpoint), checkpoint) for checkpoint in list_checkpoints(folder / "checkpoints")]
    coefficients: list[Found] = []
    gradients: list[Found] = []
    with display.phase("analyse", len(stages) * len(alphas) * 2) as advance:
        for i, (step, checkpoint) in enumerate(stages):
            if checkpoint is not None:
                load_student(project.models.student, checkpoint)
            coefficients += [row | {"step": step} for row in _coefficients(project)]
            for j, name in enumerate(theory.SKEWED):
                for k, alpha in enumerate(alphas):
                    mean, variance = theory.mean_and_variance(_gradient_norms(project, name, alpha, batches))
                    found = {"divergence": name, "alpha": alpha, "step": step, "mean": mean, "variance": variance}
                    gradients.append(found)
                    advance((i * 2 + j) * len(alphas) + k + 1)
    settings = {"batches": batches, "batch_size": run.train.batch_size, "checkpoints": [step for step, _ in stages]}
    return {"of": source, "settings": settings, "coefficients": coefficients, "gradients": gradients}


def without_a_trace(run: Run, display: Display) -> Project:
    """The models and rows of a finished ``run``, into whose folder nothing is written."""
    data = run.data.model_copy(update={"test": {}, "text": None})
    return build(run.model_copy(update={"data": data, "tracker": "none", "resume": "auto"}), display)


@torch.no_grad()
def _coefficients(project: Project) -> list[Found]:
    """Percentiles over the validation tokens of the coefficient of each divergence, at the token that is there."""
    values: dict[str, list[Tensor]] = {name: [] for name in theory.COEFFICIENTS}
    pair, state = project.models.pair, State()
    with eval_mode(project.models.student):
        for part in micro_batches(project.validation.examples, project.run.train.micro_batch_size, pair.device):
            scored = pair.score(part, state, with_teacher=True)
            assert scored.teacher is not None
            labels = scored.labels.cpu()[:, None]
            laws = (logits(head).log_softmax(-1).cpu().double().exp() for head in (scored.teacher, scored.student))
            p, q = (law.gather(-1, labels)[:, 0].clamp(min=1e-300) for law in laws)
            for name, found in values.items():
                found.append(theory.gradient_coefficient(name, p, q))
    shares = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    return [
        {"divergence": name, "percentile": percent, "coefficient": value}
        for name, found in values.items()
        for percent, value in zip(PERCENTILES, torch.cat(found).quantile(shares).tolist(), strict=True)
    ]


def _gradient_norms(project: Project, name: str, alpha: float, batches: int) -> list[float]:
    """The norm of the gradient of each of the run's first batches, at the weights as they are."""
    (term,) = distill(name, alpha=alpha)
    run, student = project.run, project.models.student
    source = dataset(project.train.examples, run.train.batch_size, run.seed)
    norms: list[float] = []
    for step in range(batches):
        rows = source(State(step=step)).rows
        count = term.count(rows)
        with eval_mode(student):
            for part in micro_batches(rows, run.train.micro_batch_size, project.models.pair.device):
                scored = project.models.pair.score(part, State(), with_teacher=True)
                (term.total(scored) / count).backward()
        squares = [p.grad.float().square().sum().cpu().double() for p in student.parameters() if p.grad is not None]
        norms.append(math.sqrt(float(torch.stack(squares).sum())))
        student.zero_grad()
    return norms


def write_analysis(found: Found, folder: Path) -> list[Path]:
    """``analysis.json`` and the plots, as SVG, in ``folder``.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError("distillm analyse draws with matplotlib: pip install 'distillm[analysis]'") from None
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "distillm"  # the same numbers give the same file
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "analysis.json", json.dumps(found, indent=1) + "\n")
    draw = {"coefficients": _draw_coefficients, "errors": _draw_errors, "gradients": _draw_gradients}
    paths = [folder / "analysis.json"]
    for name, function in draw.items():
        if name in found:
            figure = function(found[name])
            paths.append(folder / f"{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None}, bbox_inches="tight")
    return paths


def _draw_coefficients(rows: list[Found]) -> Any:
    across = "ratio" if "ratio" in rows[0] else "percentile"
    last = max(row.get("step", 0) for row in rows)
    figure, axes = _axes(1)
    for name in theory.COEFFICIENTS:
        mine = [row for row in rows if row["divergence"] == name and row.get("step", 0) == last]
        axes[0].plot([row[across] for row in mine], [abs(row["coefficient"]) for row in mine], label=name)
    axes[0].set(ylabel="|coefficient of grad q|", yscale="log")
    if across == "ratio":
        axes[0].set(xlabel="p / q, at q = 0.01", xscale="log")
    else:
        axes[0].set(xlabel=f"percentile of validation tokens, after step {last}")
    axes[0].legend()
    return figure


def _draw_errors(rows: list[Found]) -> Any:
    figure, axes = _axes(len(theory.SKEWED))
    for axis, name in zip(axes, theory.SKEWED, strict=True):
        for samples in SAMPLES:
            mine = [row for row in rows if row["divergence"] == name and row["samples"] == samples]
            line = axis.plot([r["alpha"] for r in mine], [r["normalized"] for r in mine], label=f"n = {samples}")
            axis.plot(
                [r["alpha"] for r in mine if r["alpha"] < 1 / 8],
                [r["normalized_bound"] for r in mine if r["alpha"] < 1 / 8],
                linestyle=":",
                color=line[0].get_color(),
            )
        axis.set(title=name, xlabel="alpha", ylabel="normalized squared error (dotted: bound)", yscale="log")
        axis.set(xscale="log")
        axis.legend()
    return figure


def _draw_gradients(rows: list[Found]) -> Any:
    figure, axes = _axes(len(theory.SKEWED))
    for axis, name in zip(axes, theory.SKEWED, strict=True):
        for alpha in dict.fromkeys(row["alpha"] for row in rows):
            mine = [row for row in rows if row["divergence"] == name and row["alpha"] == alpha]
            axis.plot([r["step"] for r in mine], [r["variance"] for r in mine], marker="o", label=f"alpha = {alpha:g}")
        axis.set(title=name, xlabel="step", ylabel="variance of the gradient's norm", yscale="log")
        axis.legend(fontsize="small")
    return figure


def _axes(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * count, 4))
    return figure, [figure.add_subplot(1, count, i + 1) for i in range(count)]
