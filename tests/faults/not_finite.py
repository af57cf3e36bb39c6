"""NaN and infinities put into weights, states, logits, gradients and averages of a run that is under way."""

import math
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distillm import pipeline
from distillm.checkpoint import check, list_checkpoints, step_of
from distillm.errors import ModelError, TrainingError
from distillm.pipeline import distill
from distillm.project import Project
from distillm.teacher_cache import entries
from distillm.train import Step
from faults.outcomes import ERROR_THEN_SAME, SAME, Ledger, Outcome
from tiny_run import assert_same_run, materials, tiny_run

SHORT, FULL = 1, 10
VALUES = [math.nan, math.inf, -math.inf]
CHANGES: dict[str, Any] = {"evaluation.seeds": [1], "evaluation.compare": [], "checkpoint.keep": 100}
CACHED = "the teacher's hidden states, kept on disk"


def put_into(tensor: torch.Tensor, value: float, draw: random.Random) -> None:
    """One of its numbers becomes ``value``."""
    with torch.no_grad():
        tensor.view(-1)[draw.randrange(tensor.numel())] = value


def weight(model: Any, value: float, draw: random.Random) -> None:
    put_into(draw.choice(list(model.parameters())), value, draw)


def output_of(module: Any, value: float, draw: random.Random) -> None:
    """From now on, a number of all that ``module`` puts out becomes ``value``."""

    def spoil(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full_like(out[..., :1], value), out[..., 1:]], dim=-1)

    module.register_forward_hook(spoil)


def gradient(project: Project, value: float, draw: random.Random) -> None:
    draw.choice(list(project.models.student.parameters())).register_hook(lambda found: found * value)


def average(project: Project, value: float, draw: random.Random) -> None:
    state = draw.choice(list(project.optimizer.state.values()))
    put_into(state[draw.choice(["exp_avg", "exp_avg_sq"])], value, draw)


Spoil = Callable[[Project, float, random.Random], None]
SPOTS: dict[str, Spoil] = {
    "a weight of the student": lambda project, *how: weight(project.models.student, *how),
    "a weight of the teacher": lambda project, *how: weight(project.models.teacher, *how),
    "the student's hidden states": lambda project, *how: output_of(_body(project.models.student).norm, *how),
    "the teacher's hidden states": lambda project, *how: output_of(_body(project.models.teacher).norm, *how),
    CACHED: lambda project, *how: output_of(_body(project.models.teacher).norm, *how),
    # A single logit of minus infinity is a token that a model never writes, which is no fault.
    "the student's logits": lambda project, value, draw: output_of(
        _whole(project.models.student).lm_head, abs(value), draw
    ),
    "a gradient": gradient,
    "an average of AdamW": average,
}


def _whole(model: Any) -> Any:
    return model


def _body(model: Any) -> Any:
    return model.model


@dataclass
class Bench:
    """The runs that nothing harmed: one with the teacher's states in memory, one with them on disk."""

    folder: Path

    def __post_init__(self) -> None:
        self.made = materials(self.folder / "made")
        self.plain = distill(tiny_run(self.made, self.folder / "plain", CHANGES))
        self.cached = distill(tiny_run(self.made, self.folder / "cached", self.changes(CACHED, self.folder / "cache")))

    def changes(self, spot: str, cache: Path) -> dict[str, Any]:
        if spot != CACHED:
            return CHANGES
        # With kd the first four steps each have the teacher read rows of the data, which are what is kept.
        kept = {"teacher.cache": "disk", "teacher.cache_folder": str(cache), "method": {"name": "kd"}}
        return CHANGES | kept


def spoiled_after(step: int, spoil: Callable[[Project], None]) -> Callable[[Project], Iterator[Step]]:
    """``pipeline.training``, in which ``spoil`` comes between step ``step`` and all that is done after it."""
    original = pipeline.training

    def training(project: Project) -> Iterator[Step]:
        for made in original(project):
            if made.step == step:
                spoil(project)
            yield made

    return training


def during(bench: Bench, folder: Path, spot: str, draw: random.Random) -> Outcome:
    """The fault comes after a random step; when it is gone, the run goes on from what was saved before it."""
    whole = bench.cached if spot == CACHED else bench.plain
    changes = bench.changes(spot, folder / "cache")
    step, value = draw.randint(1, 3 if spot == CACHED else 8), draw.choice(VALUES)
    failed = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "training", spoiled_after(step, lambda project: SPOTS[spot](project, value, draw)))
        try:
            distill(tiny_run(bench.made, folder / "run", changes))
        except TrainingError as error:
            failed = True
            assert f"In {folder / 'run'}, after step" in str(error)
            (at,) = re.findall(r", after step (\d+) of", str(error))
            assert ("the last good checkpoint is step" in str(error)) == (int(at) > 2), (step, error)
    made = list_checkpoints(folder / "run" / "checkpoints")
    assert {step_of(each) for each in made} >= set(range(2, step, 2)), (made, step)
    for checkpoint in made:
        check(checkpoint)
        assert finite(checkpoint), f"{checkpoint.name} after {spot} was {value}"
        same = whole / "checkpoints" / checkpoint.name
        if step_of(checkpoint) < step:
            assert {p.name: p.read_bytes() for p in checkpoint.iterdir()} == {
                p.name: p.read_bytes() for p in same.iterdir()
            }
    assert all(bool(load_file(entry.path)["states"].isfinite().all()) for entry in entries(folder / "cache"))
    if failed:
        assert not (folder / "run" / "student").exists() or step == 8
        distill(tiny_run(bench.made, folder / "run", changes | {"resume": "auto"}))
    assert_same_run(folder / "run", whole)
    return ERROR_THEN_SAME if failed else SAME


def finite(checkpoint: Path) -> bool:
    """Whether all that a checkpoint holds of student and optimizer is finite."""
    files = [checkpoint / "student.safetensors", checkpoint / "optimizer.safetensors"]
    return all(bool(tensor.isfinite().all()) for path in files for tensor in load_file(path).values())


def in_file(bench: Bench, folder: Path, model: str, draw: random.Random) -> Outcome:
    """A model's own file holds a number that is not finite: an error, or it is one that nothing reads."""
    made = Path(shutil.copytree(bench.made, folder / "made"))
    path = made / model / "model.safetensors"
    tensors = load_file(path)
    put_into(tensors[draw.choice(sorted(tensors))], draw.choice(VALUES), draw)
    save_file(tensors, path, {"format": "pt"})
    failed = False
    try:
        distill(tiny_run(made, folder / "run", CHANGES))
    except (TrainingError, ModelError) as error:
        failed = True
        assert not (folder / "run" / "student").exists(), error
        assert not list_checkpoints(folder / "run" / "checkpoints")
        shutil.rmtree(made)
        shutil.copytree(bench.made, made)
        distill(tiny_run(made, folder / "run", CHANGES | {"resume": "auto"}))
    assert_same_run(folder / "run", bench.plain)
    return ERROR_THEN_SAME if failed else SAME


def spoil_numbers(ledger: Ledger, folder: Path, count: int, seed: int = 0) -> None:
    """Each spot ``count`` times."""
    bench = Bench(folder)
    acts: dict[str, Callable[[Path, random.Random], Outcome]] = {
        spot: lambda place, draw, spot=spot: during(bench, place, spot, draw) for spot in SPOTS
    }
    for model in ("student", "teacher"):
        acts[f"the {model}'s file"] = lambda place, draw, model=model: in_file(bench, place, model, draw)
    for where, act in acts.items():
        for number in range(count):
            draw = random.Random(f"{seed}/{where}/{number}")
            place = folder / f"case-{where.replace(' ', '-')}-{number}"
            ledger.case(
                f"NaN or infinity in {where}",
                lambda act=act, place=place, draw=draw: act(place, draw),
                f"seed {seed}, case {number}",
            )
