"""Whole runs of every method: shares of batches, teacher-written rows, interruption, sweeps, packing, attention."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from typer.testing import CliRunner

from distillm import pipeline, sweep
from distillm.checkpoint import list_checkpoints, step_of
from distillm.cli import app
from distillm.config import load_run
from distillm.errors import ConfigError, DataError, Interrupted, ModelError, TrainingError
from distillm.folder import RunFolder
from distillm.methods import METHODS, REPLAY_RATIO
from distillm.pipeline import distill
from distillm.project import build
from distillm.sweep import cells_of, run_sweep
from distillm.types import State
from tiny import save, tiny_causal, tiny_tokenizer
from tiny_run import (
    Heard,
    assert_same_run,
    events,
    lines,
    same_weights,
    settings,
    tiny_run,
    weights,
    write_rows,
)
from tiny_run import rows as questions


def steps_in(folder: Path) -> list[dict[str, Any]]:
    return lines(folder / "metrics.jsonl", "step")


LONG = {
    "train.steps": 120,
    "train.batch_size": 3,
    "train.micro_batch_size": 3,
    "generation.max_new_tokens": 2,
    "data.text": None,
    "data.test": {},
    "validation.every": 20,
    "validation.samples": 0,
    "checkpoint.every": 1000,
}
AXES: dict[str, dict[str, Any]] = {
    "none": {"name": "distillm", "sampling": "none"},
    "on_policy": {"name": "distillm", "sampling": "on_policy"},
    "mixed": {"name": "distillm", "sampling": "mixed", "student_fraction": 0.4},
    "adaptive": {"name": "distillm", "sampling": "adaptive", "initial_probability": 0.3},
    "adaptive_off_policy": {"name": "distillm", "initial_probability": 0.6, "tolerance": 0.0},
    "increasing": {"name": "distillm", "initial_probability": 0.6, "replay_ratio": "increasing"},
    "constant": {"name": "distillm", "initial_probability": 0.6, "replay_ratio": "constant", "capacity": 7},
    "imitkd_off_policy": {"name": "imitkd", "off_policy": True},
    "gkd_off_policy": {"name": "gkd", "off_policy": True, "capacity": 12},
    "minillm_off_policy": {"name": "minillm", "off_policy": True},
    "kd_adaptive_rouge": {"name": "kd", "sampling": "adaptive", "initial_probability": 0.5, "trigger": "rouge_l"},
    "best": {"name": "gkd", "sampling": "adaptive", "initial_probability": 0.5, "reference": "best", "increment": 0.2},
}


@pytest.mark.parametrize("axis", AXES)
def test_the_batches_of_each_ablation_have_their_expected_shares(axis: str, made: Path, tmp_path: Path) -> None:
    method = AXES[axis]
    folder = distill(tiny_run(made, tmp_path / "run", LONG | {"method": method}))
    found = steps_in(folder)
    total = len(found)
    assert total == 120
    sampling = method.get("sampling", {"imitkd": "on_policy", "gkd": "mixed", "kd": "none", "minillm": "on_policy"}.get(
        method["name"], "adaptive_off_policy"))  # fmt: skip
    replays = method.get("off_policy", False) or sampling == "adaptive_off_policy"
    ratio = REPLAY_RATIO[method.get("replay_ratio", "decreasing")]
    fixed = {"none": 0.0, "on_policy": 1.0, "mixed": method.get("student_fraction", 0.5)}
    expected: dict[str, list[float]] = {"generated": [], "replayed": [], "dataset": []}
    for step, entry in enumerate(found):
        phi = fixed.get(sampling, entry.get("probability", 0.0))
        assert entry.get("probability", 0.0) == phi
        anew = phi * (ratio(State(step, total)) if replays else 1.0)
        for kind, share in (("generated", anew), ("replayed", phi - anew), ("dataset", 1 - phi)):
            expected[kind].append(share)
        assert replays == ("buffer" in entry)
    for kind, shares in expected.items():
        count = sum(entry["batch"] == kind for entry in found)
        spread = math.sqrt(sum(p * (1 - p) for p in shares))
        # The buffer is filled before anything can be replayed: one more generated batch, one less replayed.
        slack = 1 if replays and kind != "dataset" else 1e-6
        assert abs(count - sum(shares)) <= 3.2905 * spread + slack, (kind, count, sum(shares))
    if sampling.startswith("adaptive"):
        assert found[0]["probability"] == method.get("initial_probability", 0.0)


@pytest.fixture(name="whole", scope="module", params=sorted(METHODS))
def _whole(request: pytest.FixtureRequest, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"method": {"name": request.param}}
    return distill(tiny_run(made, tmp_path_factory.mktemp(request.param) / request.param, changes))


def test_every_method_trains_with_plain_text_on_equal_terms(whole: Path) -> None:
    found = steps_in(whole)
    assert len(found) == 8
    for entry in found:
        assert "text" in entry["terms"]
        assert math.isfinite(entry["loss"])
        assert len(entry["terms"]) == (3 if whole.name == "distillm2" and entry["step"] < 8 else 2)
    assert (whole / "student" / "model.safetensors").is_file()


def test_every_method_goes_on_bit_for_bit(whole: Path, made: Path, tmp_path: Path) -> None:
    """Stopped after step 3, in the middle of DistiLLM-2's first epoch, with its responses and gaps to remember."""
    run = tiny_run(made, tmp_path / "run", {"method": {"name": whole.name}, "checkpoint.every": 1})
    original = pipeline._log_step  # pyright: ignore[reportPrivateUsage]

    class Stopped(Exception):
        pass

    def log(project: Any, step: Any) -> None:
        if step.step == 4:
            raise Stopped
        original(project, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_log_step", log)
        with pytest.raises(Stopped):
            distill(run)
    folder = distill(load_run(str(tmp_path / "run"), ["resume=auto", "checkpoint.every=2"]))
    assert_same_run(folder, whole)


def test_minillm_logs_its_parts_and_distillm2_its_gaps(whole: Path) -> None:
    figures = {
        "minillm": {"single_step", "long_term", "reward", "importance", "clipped"},
        "distillm2": {"gap_teacher", "gap_student"},
    }.get(whole.name, set[str]())
    for entry in steps_in(whole)[:-1]:  # at the last one the teacher's responses have weight 0
        assert figures <= entry.keys()
        assert all(math.isfinite(entry[name]) for name in figures)


def test_seqkd_learns_the_teachers_responses_and_is_measured_on_the_datas_own(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    changes = {"method": {"name": "seqkd"}, "data.responses_file": str(file), "data.validation": None}
    changes |= {"data.validation_size": 2, "data.text": None}
    folder = distill(tiny_run(made, tmp_path / "run", changes))
    header, *written = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert header["teacher"] == str(made / "teacher")
    assert len(written) == 10  # the two that are held out keep theirs
    samples = lines(folder / "samples.jsonl")
    asked = {q["instruction"]: q["output"] for q in questions(12)}
    assert samples
    assert all(asked[sample["prompt"]] == sample["reference"] for sample in samples)
    before = file.read_bytes()
    distill(tiny_run(made, tmp_path / "again", changes))
    assert file.read_bytes() == before


def test_prompts_alone_are_enough_where_the_teacher_writes(made: Path, tmp_path: Path) -> None:
    bare = write_rows(tmp_path / "bare.jsonl", questions(8, output=False))
    changes = {"method": {"name": "seqkd"}, "data.train": str(bare), "data.text": None, "train.steps": 2}
    folder = distill(tiny_run(made, tmp_path / "run", changes))
    assert len(steps_in(folder)) == 2


# ------------------------------------------------------------------------------------------------------------ sweeps


def grid_file(made: Path, folder: Path, changes: dict[str, Any] | None = None) -> Path:
    short = {"train.steps": 2, "validation.every": 2, "data.text": None, "method": {"name": "sft"}}
    path = folder / "base.yaml"
    path.write_text(json.dumps(settings(made, folder / "runs", short | (changes or {}))), encoding="utf-8")
    return path


def test_a_sweep_makes_every_combination_once_and_ends_in_a_table(made: Path, tmp_path: Path) -> None:
    base = grid_file(made, tmp_path)
    arguments = ["sweep", str(base), "method.name=sft,seqkd,kd", "seed=1,2"]
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    names = {"sft_seed-1", "sft_seed-2", "seqkd_seed-1", "seqkd_seed-2", "kd_seed-1", "kd_seed-2"}
    assert {Path(line).name for line in dry.stdout.splitlines()} == names
    assert not (tmp_path / "runs").exists()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    runs = tmp_path / "runs"
    assert {p.name for p in runs.iterdir()} == names | {
        "table.md",
        "report.html",
        *[p.name for p in runs.glob("responses-*")],
    }
    assert len(list(runs.glob("responses-*.jsonl"))) == 1
    table = (runs / "table.md").read_text(encoding="utf-8")
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["sft", "seqkd", "kd"]
    assert table.count("±") >= 3
    made_at = {name: (runs / name / "report.html").stat().st_mtime_ns for name in names}
    again = CliRunner().invoke(app, arguments)
    assert "6 of 6 runs are finished already" in again.output
    assert {name: (runs / name / "report.html").stat().st_mtime_ns for name in names} == made_at


def test_an_interrupted_sweep_goes_on_where_it_stopped(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = cells_of(str(grid_file(made, tmp_path)), ["seed=1,2,3"])
    original = pipeline._log_step  # pyright: ignore[reportPrivateUsage]

    class Stopped(Exception):
        pass

    def log(project: Any, step: Any) -> None:
        if project.run.seed == 2 and step.step == 2:
            raise Stopped
        original(project, step)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_log_step", log)
        with pytest.raises(Stopped):
            run_sweep(cells, Heard())
    heard = Heard()
    finished, failed = run_sweep(cells, heard)
    assert len(finished) == 3
    assert not failed
    assert "1 of 3 runs are finished already" in heard.said


@pytest.mark.parametrize(("runs", "said"), [(2, " after 1 of 2 runs; the same"), (1, "; all runs have ended")])
def test_a_sweep_stops_though_a_run_was_about_to_end_when_it_was_asked(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: int, said: str
) -> None:
    original = pipeline.write_card

    def asked(folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        original(folder)

    cells = cells_of(str(grid_file(made, tmp_path)), ["seed=1,2"])[:runs]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_card", asked)
        with pytest.raises(Interrupted, match=f"stopped{said}") as stopped:
            run_sweep(cells, Heard())
    assert stopped.value.exit_code == 143
    assert [Path(cell.run.output, "report.html").exists() for cell in cells] == [True, False][: len(cells)]


def test_runs_side_by_side_are_those_in_turn(made: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    runs: list[list[Path]] = []
    for name, jobs in (("turn", 1), ("side", 2)):
        (tmp_path / name).mkdir()
        # Values with a dot, as names of files, and decodings whose responses are not the same.
        swept = ["method.name=seqkd", "optim.lr=0.01,0.02", "generation.max_new_tokens=2,3"]
        cells = cells_of(str(grid_file(made, tmp_path / name)), swept)
        finished, failed = run_sweep(cells if jobs == 1 else cells[::3], Heard(), jobs)
        assert not failed, failed
        runs.append([Path(cell.run.output) for cell in finished])
        assert len(list((tmp_path / name / "runs").glob("responses-*.jsonl"))) == 2
    in_turn = {path.name: path for path in runs[0]}
    assert (len(in_turn), len(runs[1])) == (4, 2)
    for path in runs[1]:
        losses = [[e["loss"] for e in steps_in(each)] for each in (in_turn[path.name], path)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert (path.parent / f"{path.name}.yaml").is_file()


@pytest.mark.parametrize("together", [False, True])  # the signal for the sweep alone, and for all processes of its job
def test_a_sweep_that_a_scheduler_ends_ends_its_runs(made: Path, tmp_path: Path, together: bool) -> None:
    base = grid_file(made, tmp_path)
    command = [sys.executable, "-m", "distillm", "sweep", str(base), "seed=1,2", "train.steps=100000", "--jobs", "2"]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    folders = [tmp_path / "runs" / f"seed-{seed}" for seed in (1, 2)]
    waited = time.monotonic() + 240
    while not all(list_checkpoints(folder / "checkpoints") for folder in folders):
        assert started.poll() is None
        assert time.monotonic() < waited
        time.sleep(0.1)
    everybody = [started.pid, *(child.pid for child in psutil.Process(started.pid).children(recursive=True))]
    for process in everybody[: None if together else 1]:
        os.kill(process, signal.SIGTERM)
    _, said = started.communicate(timeout=120)
    assert started.returncode == 143, said
    assert "stopped by SIGTERM; the same command goes on" in said
    for folder in folders:  # no process is at work in them any more, and each has saved what it had
        assert events(folder, "interrupted")
        with RunFolder(folder).held():
            assert list_checkpoints(folder / "checkpoints")


def test_a_sweep_under_nohup_goes_on_when_the_terminal_closes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[Any] = []

    def together(*_: Any) -> dict[str, str]:
        met.append((signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGTERM)))
        return {}

    monkeypatch.setattr(sweep, "_together", together)
    cells = cells_of(str(grid_file(made, tmp_path)), ["seed=1,2"])
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        run_sweep(cells, Heard(), 2)
    finally:
        signal.signal(signal.SIGHUP, before[0])
    ((terminal, scheduler),) = met
    assert terminal == signal.SIG_IGN
    assert callable(scheduler)
    assert scheduler != before[1]
    assert signal.getsignal(signal.SIGTERM) == before[1]


def test_a_run_that_fails_does_not_stop_the_others(made: Path, tmp_path: Path) -> None:
    base = grid_file(made, tmp_path)
    result = CliRunner().invoke(app, ["sweep", str(base), "optim.lr=1e30,0.01", "train.steps=4"])
    assert isinstance(result.exception, TrainingError)
    assert "1 of 2 runs failed" in str(result.exception)
    assert "lr-1e30" in str(result.exception)
    assert (tmp_path / "runs" / "lr-0.01" / "report.html").is_file()
    assert (tmp_path / "runs" / "table.md").read_text(encoding="utf-8").count("\n") == 3


def test_a_sweep_says_what_it_cannot_do(made: Path, tmp_path: Path) -> None:
    base = str(grid_file(made, tmp_path))
    with pytest.raises(ConfigError, match="nothing varies"):
        cells_of(base, ["seed=1"])
    with pytest.raises(ConfigError, match="two runs would be written to"):
        cells_of(base, ["seed=1,1"])
    with pytest.raises(ConfigError, match="is not an override"):
        cells_of(base, ["seed"])
    with pytest.raises(ConfigError, match=r"method\.name=kdd"):
        cells_of(base, ["method.name=kd,kdd"])
    cells = cells_of(base, ["evaluation.seeds=[1,2],[3]", "seed=4"])
    assert [cell.run.evaluation.seeds for cell in cells] == [[1, 2], [3]]
    cells = cells_of(base, ["seed=1,2"])
    run_sweep(cells, Heard())
    with pytest.raises(ConfigError, match="holds a finished run of other settings"):
        run_sweep(cells_of(base, ["seed=1,2", "optim.lr=0.5"]), Heard())


def test_what_only_the_teacher_reads_must_fit(made: Path, tmp_path: Path) -> None:
    long = "{% for i in range(60) %}many words {% endfor %}{{ instruction }}"
    with pytest.raises(DataError, match=r"what the teacher is to read is longer than data\.max_length"):
        distill(tiny_run(made, tmp_path / "run", {"data.teacher_template": long}))
    heard = Heard()
    words = "{{ instruction }}" + " Think." * 4
    changes = {"data.teacher_template": words, "data.max_length": 34, "train.steps": 1, "data.text": None}
    distill(tiny_run(made, tmp_path / "cut", changes), heard)
    assert any("of the teacher's 12 prompts are cut to data.max_length" in line for line in heard.said)


def test_an_epochs_responses_can_be_stopped_while_they_are_written(made: Path, tmp_path: Path) -> None:
    """DistiLLM-2 answers 12 prompts as its second epoch begins, at step 5."""
    changes = {"method": {"name": "distillm2"}, "data.text": None, "checkpoint.every": 100, "validation.every": 100}
    changes |= {"generation.batch_size": 2}
    whole = distill(tiny_run(made, tmp_path / "whole", changes))

    class Stops(Heard):
        @contextmanager
        def phase(self, name: str, total: int, done: int = 0) -> Generator[Any]:
            if name == "student's responses":
                self.said.append(name)
            with super().phase(name, total, done) as advance:

                def check(*units: Any) -> None:
                    advance(*units)
                    if name == "student's responses" and self.said.count(name) == 2:
                        os.kill(os.getpid(), signal.SIGINT)

                yield check

    with pytest.raises(Interrupted):
        distill(tiny_run(made, tmp_path / "run", changes), Stops())
    assert [step_of(c) for c in list_checkpoints(tmp_path / "run" / "checkpoints")] == [4]
    folder = distill(load_run(str(tmp_path / "run"), ["resume=auto"]))
    assert [e["loss"] for e in steps_in(folder)] == [e["loss"] for e in steps_in(whole)]
    assert same_weights(weights(folder), weights(whole))


@pytest.mark.parametrize("method", ["sft", "kd", "distillm"])
def test_a_packed_run_has_the_figures_of_a_padded_one(made: Path, tmp_path: Path, method: str) -> None:
    changes = {"method": {"name": method}, "student.dropout": 0.0}
    folders = [distill(tiny_run(made, tmp_path / str(on), changes | {"train.packing": on})) for on in (False, True)]
    for kind, names in {"step": ("loss", "grad_norm", "tokens"), "validation": ("cross_entropy", "divergence")}.items():
        padded, packed = (
            [entry[name] for entry in lines(folder / "metrics.jsonl", kind) for name in names] for folder in folders
        )
        assert len(padded) > len(names)
        assert packed == pytest.approx(padded, rel=1e-3)


def test_a_teacher_that_cannot_pack_is_read_padded_and_a_student_that_cannot_is_refused(
    made: Path, tmp_path: Path
) -> None:
    unable = save(tiny_causal("opt", seed=1), tiny_tokenizer(), tmp_path / "opt")
    changes = {"method": {"name": "kd"}, "train.packing": True}
    display = Heard()
    distill(tiny_run(made, tmp_path / "teacher", changes | {"teacher.path": str(unable)}), display)
    assert any(text.startswith("train.packing: the teacher's rows stay padded") for text in display.said)
    with pytest.raises(ModelError, match=r"OPTForCausalLM .* leave packing out"):
        distill(tiny_run(made, tmp_path / "student", changes | {"student": {"path": str(unable)}}))


def test_attention_is_what_was_asked_for_or_an_error_that_says_why_not(made: Path, tmp_path: Path) -> None:
    changes = {"method": {"name": "kd"}, "teacher.attention": "eager", "student.attention": "sdpa"}
    models = build(tiny_run(made, tmp_path / "run", changes)).models
    assert models.teacher is not None
    found = [model.config._attn_implementation for model in (models.teacher, models.student)]
    assert found == ["eager", "sdpa"]
    with pytest.raises(ModelError, match=r"student\.attention=flash_attention_3 is not to be had here"):
        build(tiny_run(made, tmp_path / "other", {"student.attention": "flash_attention_3"}))
