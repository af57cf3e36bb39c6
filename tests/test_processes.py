"""Two processes that share a run make the run of one: started by torchrun, over gloo."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import several
from distillm.checkpoint import list_checkpoints, step_of
from distillm.cli import app
from distillm.config import load_run, make_run
from distillm.errors import ConfigError
from distillm.pipeline import distill
from tiny_run import Heard, events, figures, lines, materials, same_weights, scores, settings, weights

METHODS: dict[str, dict[str, Any]] = {
    "sft": {"name": "sft"},
    "kd": {"name": "kd", "kd_weight": 0.5},
    "gkd": {"name": "gkd", "response_noise": 0.3},
    "distillm": {"name": "distillm", "initial_probability": 0.7, "capacity": 6, "replay_ratio": "constant"},
    "distillm2": {"name": "distillm2"},
    "minillm": {"name": "minillm"},
    "staleness": {"name": "distillm", "initial_probability": 0.7, "capacity": 6, "max_staleness": 3},
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO = [*TORCHRUN, "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
"""Two processes, which find each other on a port that is free."""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def launch(*command: object) -> subprocess.CompletedProcess[str]:
    """Two processes of ``command``."""
    told = [*TWO, *map(str, command)]
    return subprocess.run(told, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


def run_together(folder: Path, wanted: Sequence[dict[str, Any]]) -> str:
    """Make every run of ``wanted`` by two processes; what they said on standard error."""
    paths: list[Path] = []
    for number, each in enumerate(wanted):
        paths.append(folder / f"wanted-{number}.json")
        paths[-1].write_text(json.dumps(each), encoding="utf-8")
    told = launch(several.__file__, *paths)
    assert told.returncode == 0, told.stderr
    return told.stderr


MARIAN = {"method": METHODS["kd"], "data.text": None, "student.dropout": 0.0, "train.micro_batch_size": 1}
SEQKD: dict[str, Any] = {"method": {"name": "seqkd"}, "train.steps": 2, "data.text": None}
THREE_STEPS = {"train.steps": 3, "device": "cpu"}


def changes_of(name: str) -> dict[str, Any]:
    # Rows of one process are no multiple of two, so that one has less than the other, or nothing at all.
    return {"method": METHODS[name], "student.dropout": 0.0, "train.batch_size": 3, "train.micro_batch_size": 1}


def going_on(steps: int) -> dict[str, Any]:
    # With dropout: each process draws from a generator of its own, which checkpoints keep.
    return {"method": METHODS["distillm"], "train.steps": steps, "optim.schedule": "constant"}


@pytest.fixture(name="marian", scope="module")
def _marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return materials(tmp_path_factory.mktemp("marian"), "marian")  # whose positions are computed once and for all


@pytest.fixture(name="together", scope="module")
def _together(made: Path, marian: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where all runs of two processes are, which one launch makes, and what it said on standard error."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "taken").mkdir()
    (folder / "taken" / "metrics.jsonl").touch()

    def wanted(name: str, changes: dict[str, Any], materials: Path = made) -> dict[str, Any]:
        return settings(materials, folder / name, changes)

    own_capacity = METHODS["distillm"] | {"capacity_per_process": True, "initial_probability": 1.0}
    runs = [wanted(name, changes_of(name)) for name in METHODS]
    runs += [
        wanted("marian", MARIAN, marian),
        wanted("written", SEQKD),
        # Again, so that the old responses are refused; and where there are none.
        *[wanted(name, SEQKD | {"generation.max_new_tokens": 3, "overwrite": True}) for name in ("written", "new")],
        wanted("capacity", {"method": own_capacity, "train.steps": 8}),
        wanted("whole", going_on(8)),
        wanted("parts", going_on(4)),
        wanted("parts", going_on(8) | {"resume": "auto"}),
        wanted("alone", going_on(4)),
        wanted("three steps", THREE_STEPS),
        wanted("taken", {}),
        wanted("exploding", {"optim.lr": 1e30, "optim.warmup_steps": 0}),
    ]
    return folder, run_together(folder, runs)


@pytest.fixture(name="both", scope="module")
def _both(made: Path, together: tuple[Path, str]) -> dict[str, tuple[Path, Path]]:
    """For every method the run of one process and that of two."""
    folder, _ = together
    return {
        name: (distill(make_run(settings(made, folder / "one" / name, changes_of(name)))), folder / name)
        for name in METHODS
    }


def parts(entry: Any, name: str = "") -> tuple[dict[str, float], dict[str, Any]]:
    """The numbers in an entry of a log, by where they are, and everything else."""
    if isinstance(entry, dict):
        found = [parts(entry[key], f"{name}/{key}") for key in entry]
        return {k: v for own, _ in found for k, v in own.items()}, {k: v for _, own in found for k, v in own.items()}
    if isinstance(entry, list):
        return parts(dict(enumerate(entry)), name)
    is_number = isinstance(entry, int | float) and not isinstance(entry, bool)
    return ({name: entry}, {}) if is_number else ({}, {name: entry})


def assert_near(one: Any, other: Any, absolute: float) -> None:
    (mine, rest), (theirs, others) = parts(one), parts(other)
    assert others == rest
    # Sums are made in another order: float32 rounds them in the seventh place, and training carries that on.
    assert theirs == pytest.approx(mine, rel=2e-4, abs=absolute, nan_ok=True)


def assert_same_as_one(one: Path, two: Path) -> None:
    """The run in ``two`` is that in ``one`` but for the order of sums."""
    mine, theirs = figures(one), figures(two)
    assert len(mine) == len(theirs) > 8
    for left, right in zip(mine, theirs, strict=True):
        assert_near(left, right, 2e-6)
    expected, found = weights(one), weights(two)
    assert expected.keys() == found.keys()
    for weight, tensor in expected.items():
        torch.testing.assert_close(found[weight], tensor, rtol=1e-3, atol=1e-4)
    assert lines(two / "samples.jsonl") == lines(one / "samples.jsonl")
    assert (one / "tokens.jsonl").exists() == (two / "tokens.jsonl").exists()  # a teacher that is not here reads none
    if (one / "tokens.jsonl").exists():
        assert_near(lines(one / "tokens.jsonl"), lines(two / "tokens.jsonl"), 1e-3)
    for file, result in scores(one).items():
        again = scores(two)[file]
        assert [row["predictions"] for row in again["predictions"]] == [
            row["predictions"] for row in result["predictions"]
        ]
        assert_near(result["scores"], again["scores"], 1e-3)
    assert (two / "report.html").is_file()


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_make_the_run_of_one(both: dict[str, tuple[Path, Path]], name: str) -> None:
    assert_same_as_one(*both[name])


def test_weights_without_a_gradient_hold_nobody_up(marian: Path, together: tuple[Path, str]) -> None:
    folder, _ = together
    one = distill(make_run(settings(marian, folder / "one" / "marian", MARIAN)))
    mine, theirs = figures(one), figures(folder / "marian")
    assert len(mine) == len(theirs) > 8
    for left, right in zip(mine, theirs, strict=True):
        assert_near(left, right, 1e-4)  # not the weights: a key's bias has rounding for a gradient


def test_none_reads_what_another_is_about_to_delete(together: tuple[Path, str]) -> None:
    folder, _ = together
    responses = lines(folder / "written" / "responses.jsonl")
    assert responses
    assert responses == lines(folder / "new" / "responses.jsonl")


def test_the_capacity_is_the_runs_or_each_process_has_its_own(together: tuple[Path, str]) -> None:
    folder, _ = together
    sizes = [entry["buffer"] for entry in lines(folder / "capacity" / "metrics.jsonl", "step")]
    assert max(sizes) == 2 * METHODS["distillm"]["capacity"]


def test_every_row_is_validated_and_scored_once(both: dict[str, tuple[Path, Path]]) -> None:
    _, two = both["kd"]
    scored = json.loads((two / "eval" / "numbers-student.json").read_text(encoding="utf-8"))
    assert [row["id"] for row in scored["predictions"]] == ["test:0", "test:1", "test:2"]
    assert [entry["step"] for entry in lines(two / "metrics.jsonl", "step")] == list(range(1, 9))


def test_what_two_processes_leave_goes_on_as_two_or_as_one(together: tuple[Path, str]) -> None:
    folder, _ = together
    assert figures(folder / "parts") == figures(folder / "whole")
    assert same_weights(weights(folder / "parts"), weights(folder / "whole"))
    display = Heard()
    distill(load_run(str(folder / "alone"), ["resume=auto", "train.steps=8"]), display)
    assert any("made with 2 processes, now there are 1" in text and "dropout" in text for text in display.said)
    assert len(events(folder / "alone", "processes")) == 1
    assert [entry["step"] for entry in lines(folder / "alone" / "metrics.jsonl", "step")] == list(range(1, 9))


def test_a_fault_in_one_process_ends_both(together: tuple[Path, str]) -> None:
    folder, said = together
    for number in (0, 1):
        assert f"ConfigError in {number}: {folder / 'taken'} already holds a run" in said
        assert f"TrainingError in {number}: step " in said


def test_the_command_says_everything_once_and_saves_when_it_is_stopped(made: Path, tmp_path: Path) -> None:
    wanted = settings(made, tmp_path / "run", {"train.steps": 3000, "validation.every": 3000})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(wanted), encoding="utf-8")
    command = [*TWO, "-m", "distillm", "train", str(tmp_path / "run.yaml")]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        log = tmp_path / "run" / "metrics.jsonl"
        while not (log.exists() and len(lines(log, "step")) > 2):
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)  # as a scheduler does; torchrun passes it on
        _, said = run.communicate(timeout=120)
    assert said.count("loading the teacher") == 1
    assert said.count("error: stopped after step") == 1, said
    assert "process 1: stopped after step" in said
    (stopped,) = events(tmp_path / "run", "interrupted")
    assert stopped["message"] == "stopped by SIGTERM"
    assert step_of(list_checkpoints(tmp_path / "run" / "checkpoints")[-1]) == stopped["step"]


def test_accelerates_launcher_starts_two_and_the_result_is_shown_once(
    made: Path, together: tuple[Path, str], tmp_path: Path
) -> None:
    text = yaml.safe_dump(settings(made, tmp_path / "run", THREE_STEPS))
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "distillm", "train", str(tmp_path / "run.yaml")]
    told = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("Run: ") == 1, told.stdout
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")[-1] / "state.json"
    assert json.loads(saved.read_text(encoding="utf-8"))["processes"] == 2
    assert figures(tmp_path / "run") == figures(together[0] / "three steps")


def test_other_commands_do_not_share_their_work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as each launcher sets it
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(settings(made, tmp_path / "run")), encoding="utf-8")
    told = CliRunner().invoke(app, ["cache", "warm", str(run)])
    assert isinstance(told.exception, ConfigError)
    assert "only distillm train shares its work between them" in str(told.exception)


def test_two_machines_are_two_launchers_with_numbers(made: Path, both: dict[str, tuple[Path, Path]], tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    wanted = tmp_path / "run.yaml"
    wanted.write_text(yaml.safe_dump(settings(made, tmp_path / "run", changes_of("distillm"))), encoding="utf-8")
    ends = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    launchers = [
        subprocess.Popen(
            [*TORCHRUN, *ends, "--node-rank", str(number), "-m", "distillm", "train", str(wanted)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    shown, said = zip(*(launcher.communicate(timeout=120) for launcher in launchers), strict=True)
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    assert "".join(shown).count("Run: ") == 1, shown
    _, two = both["distillm"]
    assert figures(tmp_path / "run") == figures(two)
    assert same_weights(weights(tmp_path / "run"), weights(two))
