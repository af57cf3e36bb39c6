"""A student whose weights are spread over two processes (FSDP2, over gloo) makes the run of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from command_line import done
from distillm import sharding
from distillm.config import as_yaml, load_run, make_run
from distillm.errors import ConfigError
from distillm.pipeline import distill
from distillm.project import build
from test_processes import METHODS, assert_same_as_one, changes_of, launch, run_together
from tiny_run import Heard, figures, materials, same_weights, settings, tiny_run, weights

SHARDED = {"train.shard": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "gradient checkpointing": {"train.gradient_checkpointing": True},
    "CPU offload": {"train.cpu_offload": True},
    "bfloat16": {"train.mixed_precision": "bf16"},
    "another loss": {"data.text": None},
}
TEACHERS: dict[str, dict[str, Any]] = {
    "kept": {},
    "read anew": {"teacher.cache": "off"},
    "on disk": {"teacher.cache": "disk"},
    "a student that is replicated": {"train.shard": False},
    "a teacher that writes": {"method": METHODS["distillm2"], "data.text": None},
    "a teacher that is mixed in": {"method": METHODS["minillm"] | {"teacher_mix": 0.3}},
}
"""With the teacher's weights spread, too."""
KINDS = {"t5": "kd", "gemma2": "gkd"}
"""Not a kind whose keys have a bias: its gradient is nothing but rounding, which AdamW makes large."""


@pytest.fixture(name="made", scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: materials(tmp_path_factory.mktemp(kind), kind) for kind in ("llama", *KINDS)}


def wanted(name: str) -> tuple[str, dict[str, Any]]:
    """The kind of model, and the changes, of a run that is made once sharded and once by one process."""
    if name in METHODS:
        return "llama", changes_of(name)
    if name in KINDS:
        return name, changes_of(KINDS[name])
    if name in TEACHERS:
        return "llama", changes_of("distillm") | TEACHERS[name]
    return "llama", changes_of("distillm") | OPTIONS[name]


@pytest.fixture(name="cached", scope="module")
def _cached(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run that reads what a command has kept of its teacher."""
    folder = tmp_path_factory.mktemp("cached")
    changes = {"method": METHODS["kd"], "teacher.cache": "disk", "teacher.cache_folder": str(folder / "cache")}
    path = folder / "run.yaml"
    path.write_text(as_yaml(tiny_run(made["llama"], folder / "warm", changes)), encoding="utf-8")
    name = done("cache", "warm", str(path)).split("teacher.cached=")[1].split()[0]
    return changes | {"teacher.cached": name} | SHARDED | {"student.dropout": 0.0}


@pytest.fixture(name="folder", scope="module")
def _folder(made: dict[str, Path], cached: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Under ``two`` every run by two processes; and one that was stopped and gone on with, sharded and not."""
    folder = tmp_path_factory.mktemp("runs")

    def given(name: str, steps: int, **more: Any) -> dict[str, Any]:
        changes = {"method": METHODS["distillm"], "train.steps": steps, "optim.schedule": "constant", **more}
        return settings(made["llama"], folder / name, changes | SHARDED)

    runs: list[dict[str, Any]] = []
    for name in (*METHODS, *OPTIONS, *KINDS):
        kind, changes = wanted(name)
        runs.append(settings(made[kind], folder / "two" / name, changes | SHARDED))
    for name in TEACHERS:
        changes = {"teacher.placement": "shard", "teacher.cache_folder": str(folder / "cache")} | SHARDED
        runs.append(settings(made["llama"], folder / "two" / name, changes | wanted(name)[1]))
    again = [given("whole", 8), given("parts", 4), given("parts", 8, resume="auto"), given("alone", 4)]
    run_together(folder, [*runs, *again, settings(made["llama"], folder / "two" / "cached", cached)])
    return folder


@pytest.mark.parametrize("name", [*METHODS, *OPTIONS, *KINDS, *TEACHERS])
def test_a_sharded_student_makes_the_run_of_one_process(made: dict[str, Path], folder: Path, name: str) -> None:
    kind, changes = wanted(name)
    alone = {key: value for key, value in changes.items() if key != "train.cpu_offload"}
    alone["teacher.cache"] = "off" if changes.get("teacher.cache") == "off" else "memory"
    assert_same_as_one(distill(make_run(settings(made[kind], folder / "one" / name, alone))), folder / "two" / name)


def test_a_sharded_run_goes_on_bit_for_bit_and_as_one_process(folder: Path) -> None:
    # With dropout, and moments that are spread like the weights.
    assert figures(folder / "parts") == figures(folder / "whole")
    assert same_weights(weights(folder / "parts"), weights(folder / "whole"))
    display = Heard()
    distill(load_run(str(folder / "alone"), ["resume=auto", "train.steps=8", "train.shard=false"]), display)
    assert any("made with 2 processes, now there are 1" in text for text in display.said)
    assert len(figures(folder / "alone")) == len(figures(folder / "whole"))


def test_each_process_holds_its_part_and_all_of_it_only_inside_whole() -> None:
    told = launch(__file__)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("as expected") == 2


def test_what_was_kept_serves_several_processes(made: dict[str, Path], folder: Path, cached: dict[str, Any]) -> None:
    one = distill(tiny_run(made["llama"], folder / "one" / "cached", cached | {"train.shard": False}))
    assert_same_as_one(one, folder / "two" / "cached")


def test_one_process_without_a_launcher_says_that_there_is_nothing_to_spread(
    made: dict[str, Path], tmp_path: Path
) -> None:
    display = Heard()
    build(tiny_run(made["llama"], tmp_path / "run", SHARDED), display)
    assert any("nothing to spread" in text for text in display.said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.cpu_offload": True}, "cpu_offload goes with shard"),
        (SHARDED | {"student.lora": {}, "student.dropout": None}, "an adapter's are few"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    made: dict[str, Path], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny_run(made["llama"], tmp_path, changes)


def in_each_process() -> None:
    """Run by torchrun: what each process holds outside of ``whole``, inside, and afterwards."""
    from accelerate import PartialState

    from tiny import tiny_model

    PartialState(cpu=True)
    plain, model = (tiny_model("llama", seed=1, tie_word_embeddings=True) for _ in range(2))
    ids = torch.arange(12).reshape(2, 6)
    expected = plain(ids).logits
    sharding.shard(model, torch.device("cpu"))

    def held(module: nn.Module) -> int:
        parameters = module.parameters()
        return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in parameters)  # pyright: ignore

    total = held(plain)
    assert abs(held(model) - total / 2) < total / 10, (held(model), total)
    with torch.no_grad(), sharding.whole(model):
        assert held(model) == total
        for _ in range(1 + torch.distributed.get_rank()):  # not equally often
            torch.testing.assert_close(model(ids).logits, expected)
        assert held(model) == total
    assert abs(held(model) - total / 2) < total / 10
    # Weights that are changed are gathered anew.
    with torch.no_grad():
        for own, other in zip(model.parameters(), plain.parameters(), strict=True):
            own.mul_(1.5)
            other.mul_(1.5)
    with torch.no_grad(), sharding.whole(model):
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    torch.distributed.destroy_process_group()
    print("as expected")  # noqa: T201


if __name__ == "__main__":
    in_each_process()
