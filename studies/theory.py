"""The theory of a run's own models: the error of an estimate, and what a page shows of it and of `analyse`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillm import theory
from distillm.analyse import without_a_trace
from distillm.checkpoint import list_checkpoints, load_student, step_of
from distillm.config import load_run
from distillm.display import Display
from distillm.heads import eval_mode
from distillm.kernels import logits
from distillm.train import micro_batches
from distillm.types import State

from . import plots
from .plan import Study
from .results import Result
from .text import named, table

SKEWS = (0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9)
SAMPLES = (30, 300)


def estimator_errors(
    source: Path, display: Display, *, tokens: int, trials: int, skews: Sequence[float] = SKEWS
) -> list[dict[str, Any]]:
    """The mean over validation tokens, at the last checkpoint, as the third panel of the paper's figure 3 has it."""
    run = load_run(str(source))
    project = without_a_trace(run.model_copy(update={"output": str(source)}), display)
    checkpoint = list_checkpoints(source / "checkpoints")[-1]
    load_student(project.models.student, checkpoint)
    rows = project.validation.examples
    with torch.no_grad(), eval_mode(project.models.student):
        part = next(iter(micro_batches(rows, run.train.micro_batch_size, project.models.pair.device)))
        scored = project.models.pair.score(part, State(), with_teacher=True)
        assert scored.teacher is not None
        p, q = (logits(head).double().softmax(-1).cpu() for head in (scored.teacher, scored.student))
    generator = torch.Generator().manual_seed(run.seed)
    chosen = torch.randperm(len(p), generator=generator)[:tokens]
    pairs = list(zip(p[chosen], q[chosen], strict=True))
    return [
        {"divergence": name, "alpha": alpha, "samples": samples, "step": step_of(checkpoint), "tokens": len(pairs)}
        | {"normalized": theory.normalized(alpha, _error(name, pairs, alpha, samples, trials, generator))}
        for name in theory.SKEWED
        for samples in SAMPLES
        for alpha in skews
    ]


def _error(
    name: str,
    pairs: Sequence[tuple[Tensor, Tensor]],
    alpha: float,
    samples: int,
    trials: int,
    generator: torch.Generator,
) -> float:
    errors = [theory.estimator_error(name, p, q, alpha, samples, trials, generator) for p, q in pairs]
    return sum(errors) / len(errors)


def sections(study: Study, kept: dict[str, Result], into: Path) -> list[str]:
    """What a page says of each analysis that is kept."""
    lines: list[str] = []
    for stage in study.stages:
        if stage.analyse and stage.name in kept:
            found = kept[stage.name].record
            name, rows, errors = f"{study.name}-{stage.name}", found["gradients"], found["errors"]
            plots.gradients(rows, into / f"{name}.svg")
            plots.coefficients(found["coefficients"], into / f"{name}-coefficients.svg")
            plots.errors(errors, into / f"{name}-errors.svg")
            batches = found["settings"]["batches"]
            lines += [
                f"## Of the run with {named(stage.analyse)}",
                "",
                "**What multiplies the gradient of a token's probability**, at the tokens of the validation rows, skew "
                "0.1.",
                "",
                f"![coefficients by percentile of tokens]({name}-coefficients.svg)",
                "",
                *_last_coefficients(found["coefficients"]),
                "",
                "**The error of an estimate**: the laws of both models at "
                f"{errors[0]['tokens']} validation tokens, after step {errors[0]['step']}, are replaced by the "
                "frequencies of so many draws; the mean squared error is divided by (1 - a)², as the paper does, for "
                "an optimizer that normalises gradients.",
                "",
                f"![error of an estimate by skew]({name}-errors.svg)",
                "",
                *_errors_table(errors),
                "",
                "The paper's bound has its least near a skew of 0.1; in bold is where these errors have theirs. The "
                "gradients below shrink faster with the skew than 1 - a does. Divided by their squared norm instead, "
                f"for the skews that have both, the errors of {SAMPLES[0]} draws are:",
                "",
                *_errors_by_norm(errors, rows),
                "",
                f"**The gradient of a batch**, for several skews: mean and variance of its norm over {batches} "
                "batches, at the weights of each checkpoint of the run; no step is made.",
                "",
                f"![size and variance of the gradient]({name}.svg)",
                "",
                *_last_gradients(rows),
                "",
            ]
    return lines


def _errors_table(errors: list[dict[str, Any]]) -> list[str]:
    by_skew: dict[tuple[str, int], dict[float, float]] = {}
    for row in errors:
        by_skew.setdefault((row["divergence"], row["samples"]), {})[row["alpha"]] = row["normalized"]
    rows: list[list[str]] = []
    for skew in dict.fromkeys(row["alpha"] for row in errors):
        rows.append([f"{skew:g}", *(_least(found[skew], found) for found in by_skew.values())])
    header = ["skew", *(f"{name.replace('_', ' ')}, {samples} draws" for name, samples in by_skew)]
    return table(header, rows)


def _errors_by_norm(errors: list[dict[str, Any]], gradients: list[dict[str, Any]]) -> list[str]:
    """The squared errors over the squared norm of a batch's gradient, at the checkpoint of the errors."""
    at = {(row["divergence"], row["alpha"]): row["mean"] for row in gradients if row["step"] == errors[0]["step"]}
    found: dict[str, dict[float, float]] = {}
    for row in errors:
        norm = at.get((row["divergence"], row["alpha"]))
        if norm is not None and row["samples"] == SAMPLES[0]:
            squared = row["normalized"] * (1 - row["alpha"]) ** 2
            found.setdefault(row["divergence"], {})[row["alpha"]] = squared / norm**2
    skews = list(dict.fromkeys(skew for values in found.values() for skew in values))
    rows = [[f"{skew:g}", *(_least(values[skew], values) for values in found.values())] for skew in skews]
    return table(["skew", *(name.replace("_", " ") for name in found)], rows)


def _least(value: float, among: dict[float, float]) -> str:
    """In bold where none is less."""
    return f"**{value:.3g}**" if value == min(among.values()) else f"{value:.3g}"


def _last_coefficients(rows: list[dict[str, float]]) -> list[str]:
    last = max(row["step"] for row in rows)
    percentiles = list(dict.fromkeys(row["percentile"] for row in rows))
    shown: list[list[str]] = []
    for name in dict.fromkeys(str(row["divergence"]) for row in rows):
        values = [row["coefficient"] for row in rows if row["divergence"] == name and row["step"] == last]
        shown.append([name.replace("_", " "), *(f"{value:.3g}" for value in values)])
    return table([f"after step {last}, percentile of tokens", *map(str, percentiles)], shown)


def _last_gradients(rows: list[dict[str, float]]) -> list[str]:
    steps = list(dict.fromkeys(row["step"] for row in rows))
    shown = [
        [
            str(row["divergence"]).replace("_", " "),
            f"{row['alpha']:g}",
            str(row["step"]),
            f"{row['mean']:.3g}",
            f"{row['variance'] ** 0.5 / row['mean']:.3f}",
        ]
        for row in rows
        if row["step"] in (steps[0], steps[-1])
    ]
    return table(["divergence", "skew", "step", "mean norm", "deviation / mean"], shown)
