"""A run that is stopped, by whatever and wherever, goes on to the very run it would have been."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import killed
from distillm import pipeline
from distillm.checkpoint import list_checkpoints, step_of
from distillm.config import load_run
from distillm.display import Advance, Display
from distillm.errors import Interrupted, StorageError
from distillm.pipeline import distill
from test_checkpoint import reseal
from tiny_run import (
    Heard,
    assert_same_run,
    events,
    lines,
    same_weights,
    scores,
    settings,
    tiny_run,
    weights,
)


class Stopped(Exception):
    """Stands for whatever may end a process between two steps."""


@pytest.fixture(name="whole", scope="module")
def _whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stopped."""
    return distill(tiny_run(made, tmp_path_factory.mktemp("whole")))


def resumed(folder: Path, *overrides: str, display: Display | None = None) -> Path:
    return distill(load_run(str(folder), ["resume=auto", *overrides]), display)


def stop_after(monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
    """Let ``pipeline.NAME`` end the run when the step is made: ``_log_step`` before it is logged, ``_save`` ..."""
    original = getattr(pipeline, name)

    def stopping(project: Any, *rest: Any) -> Any:
        if project.state.step == step:
            raise Stopped
        return original(project, *rest)

    monkeypatch.setattr(pipeline, name, stopping)


def stopped(run: Callable[[], Any], name: str, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, name, step)
        with pytest.raises(Stopped):
            run()


def test_the_run_that_is_compared_with_uses_all_that_must_be_restored(whole: Path):
    batches = {entry["batch"] for entry in lines(whole / "metrics.jsonl", "step")}
    assert batches == {"dataset", "generated", "replayed"}
    assert all("text" in entry["terms"] for entry in lines(whole / "metrics.jsonl", "step"))
    assert any(entry["buffer_age"] for entry in lines(whole / "metrics.jsonl", "step"))


def test_a_run_depends_on_its_settings_alone(made: Path, whole: Path, tmp_path: Path):
    torch.rand(7)
    assert_same_run(distill(tiny_run(made, tmp_path / "again")), whole)


def test_dropout_draws_are_part_of_what_is_restored(
    made: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stopped(lambda: distill(tiny_run(made, tmp_path / "run")), "_log_step", 5)
    monkeypatch.setattr("distillm.checkpoint.torch.set_rng_state", lambda state: None)
    assert not same_weights(weights(resumed(tmp_path / "run")), weights(whole))


def test_a_run_stopped_again_and_again_ends_as_if_it_never_had_been(made: Path, whole: Path, tmp_path: Path):
    folder = tmp_path / "run"
    stopped(lambda: distill(tiny_run(made, folder)), "_log_step", 1)  # before the first checkpoint
    assert not list_checkpoints(folder / "checkpoints")
    for name, step in [("_save", 2), ("_log_step", 3), ("_validation", 4), ("_save", 4), ("_log_step", 6)]:
        stopped(lambda: resumed(folder), name, step)
    stopped(lambda: resumed(folder), "_validation", 8)
    stopped(lambda: resumed(folder), "_score_tests", 8)
    assert_same_run(resumed(folder), whole)
    assert [entry["step"] for entry in lines(folder / "metrics.jsonl", "step")] == list(range(1, 9))


def test_where_the_teachers_states_are_kept_is_decided_as_the_run_begins(
    made: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tiny_run(made, tmp_path / "run")
    stopped(lambda: distill(run), "_log_step", 4)
    # Less memory is free now; read together, not one by one, rows would have other last bits.
    monkeypatch.setattr("distillm.caching.cache_kind", no_room)
    display = Heard()
    assert_same_run(resumed(tmp_path / "run", display=display), whole)
    assert any(text.startswith("teacher cache: in memory, as when the run began") for text in display.said)
    assert not same_weights(weights(distill(tiny_run(made, tmp_path / "other"))), weights(whole))


@pytest.mark.parametrize("why", ["another teacher", "no checkpoint", "not noted"])
def test_where_the_teachers_states_are_kept_is_decided_anew(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
):
    run = tiny_run(made, tmp_path / "run", {"checkpoint.every": 8} if why == "no checkpoint" else {})
    stopped(lambda: distill(run), "_log_step", 3)
    path = tmp_path / "run" / "run.yaml"
    assert noted(path) == "memory"
    if why == "not noted":  # by an earlier version
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
        del record["provenance"]["resolved"]["teacher.cache"]
        path.write_text(yaml.safe_dump(record), encoding="utf-8")
    monkeypatch.setattr("distillm.caching.cache_kind", no_room)
    display, said = Heard(), "teacher cache: off, as neither memory nor disk has room"
    resumed(tmp_path / "run", *(["teacher.cache_gib=1"] if why == "another teacher" else []), display=display)
    assert any(text.startswith(said) for text in display.said)
    assert noted(path) == "off"


def no_room(*_: Any) -> str:
    return "off"


def noted(path: Path) -> str:
    """What a run's settings say that ``teacher.cache=auto`` came to."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))["provenance"]["resolved"]["teacher.cache"]


@pytest.mark.parametrize("method", [{"name": "sft"}, {"name": "kd", "kd_weight": 0.5}])
def test_methods_without_a_buffer_resume_as_well(made: Path, tmp_path: Path, method: dict[str, Any]):
    changes = {"method": method, "validation.select": "rouge_l"}
    whole = distill(tiny_run(made, tmp_path / "whole", changes))
    stopped(lambda: distill(tiny_run(made, tmp_path / "run", changes)), "_log_step", 5)
    assert_same_run(resumed(tmp_path / "run"), whole)


def test_a_resumed_run_says_so_and_that_nothing_else_changed(made: Path, tmp_path: Path):
    stopped(lambda: distill(tiny_run(made, tmp_path / "run")), "_log_step", 3)
    display = Heard()
    resumed(tmp_path / "run", display=display)
    assert [entry["message"] for entry in events(tmp_path / "run", "resumed")] == ["from step-00000002"]
    assert "resumed from step-00000002" in display.said


def test_a_finished_run_goes_on_with_more_steps_and_is_scored_anew(whole: Path, made: Path, tmp_path: Path):
    folder = distill(tiny_run(made, tmp_path / "run", {"validation.select": "divergence"}))
    before, stamps = scores(folder), {p.name: p.stat().st_mtime_ns for p in (folder / "eval").iterdir()}
    first = weights(folder)
    display = Heard()
    resumed(folder, "train.steps=10", display=display)
    assert [entry["step"] for entry in lines(folder / "metrics.jsonl", "step")] == list(range(1, 11))
    assert [entry["step"] for entry in lines(folder / "metrics.jsonl", "validation")] == [0, 4, 8, 10]
    assert any("changed settings: train.steps=10" in text for text in display.said)
    assert load_run(str(folder)).train.steps == 10
    assert not same_weights(weights(folder), first)
    assert scores(folder)["numbers-student.json"] != before["numbers-student.json"]
    after = {p.name: p.stat().st_mtime_ns for p in (folder / "eval").iterdir()}
    assert [name for name in stamps if after[name] != stamps[name]] == ["numbers-student.json"]
    assert [step_of(p) for p in list_checkpoints(folder / "checkpoints")] == [8, 10]


def test_changed_settings_are_said_written_down_and_in_force(made: Path, tmp_path: Path):
    stopped(lambda: distill(tiny_run(made, tmp_path / "run")), "_log_step", 5)
    overrides = ["optim.weight_decay=0.9", f"data.test.more={made / 'valid.jsonl'}", "evaluation.seeds=[4]"]
    resumed(tmp_path / "run", *overrides)
    stopped(lambda: distill(tiny_run(made, tmp_path / "plain")), "_log_step", 5)
    resumed(tmp_path / "plain")
    (message,) = [entry["message"] for entry in events(tmp_path / "run", "resumed")]
    assert message.startswith("from step-00000004, with changed settings: ")
    for said in ("optim.weight_decay=0.9", "data.test.more=", "evaluation.seeds=[4]"):
        assert said in message
    kept = load_run(str(tmp_path / "run"))
    assert kept.optim.weight_decay == 0.9
    assert set(kept.data.test) == {"numbers", "more"}
    assert not same_weights(weights(tmp_path / "run"), weights(tmp_path / "plain"))
    assert {name: result["seeds"] for name, result in scores(tmp_path / "run").items()} == {
        name: [4] for name in ("more-student.json", "more-teacher.json", "numbers-student.json", "numbers-teacher.json")
    }


def test_scores_of_other_data_or_decoding_do_not_outlive_a_change(made: Path, tmp_path: Path):
    folder = distill(tiny_run(made, tmp_path / "run"))
    resumed(folder, "generation.max_new_tokens=3")
    for result in scores(folder).values():
        assert result["decoding"]["max_new_tokens"] == 3
    (made / "other.jsonl").write_text((made / "valid.jsonl").read_text())
    resumed(folder, f"data.test={{numbers: {made / 'other.jsonl'}}}")
    assert {result["num_rows"] for result in scores(folder).values()} == {4}


def test_the_best_by_one_figure_is_not_compared_with_another(made: Path, tmp_path: Path):
    changes = {"validation.select": "rouge_l", "validation.every": 2, "optim.lr": 0.001}
    stopped(lambda: distill(tiny_run(made, tmp_path / "run", changes)), "_log_step", 5)
    resumed(tmp_path / "run", "validation.select=cross_entropy")
    measured = {e["step"]: e["cross_entropy"] for e in lines(tmp_path / "run" / "metrics.jsonl", "validation")}
    chosen = [entry["step"] for entry in events(tmp_path / "run", "best") if entry["step"] > 4]
    assert chosen[-1] == min([6, 8], key=measured.__getitem__)


def test_another_thread_count_is_said(made: Path, tmp_path: Path):
    stopped(lambda: distill(tiny_run(made, tmp_path / "run")), "_log_step", 3)
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["threads"] == torch.get_num_threads()
    (checkpoint / "state.json").write_text(json.dumps(state | {"threads": 64}))
    reseal(checkpoint)
    display = Heard()
    resumed(tmp_path / "run", display=display)
    assert any("made with 64 threads, now there are 1" in text for text in display.said)
    (event,) = events(tmp_path / "run", "threads")
    assert "made with 64 threads" in event["message"]


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_taken(made: Path, whole: Path, tmp_path: Path):
    folder, display = tmp_path / "run", Heard()
    stopped(lambda: distill(tiny_run(made, folder)), "_log_step", 7)
    newest = list_checkpoints(folder / "checkpoints")[-1]
    (newest / "student.safetensors").write_bytes(b"\x00" * 100)
    assert_same_run(resumed(folder, display=display), whole)
    assert any("step-00000006 is damaged" in text and "set aside" in text for text in display.said)
    assert "resumed from step-00000004" in display.said
    (event,) = events(folder, "damaged")
    assert "step-00000006 is damaged" in event["message"]


def test_a_run_without_a_whole_checkpoint_says_so_and_begins_anew_when_asked_again(
    made: Path, whole: Path, tmp_path: Path
):
    folder = tmp_path / "run"
    stopped(lambda: distill(tiny_run(made, folder)), "_log_step", 7)
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        (checkpoint / "state.json").unlink()
    with pytest.raises(StorageError, match=r"No whole checkpoint is left: the same command begins the run anew"):
        resumed(folder)
    assert_same_run(resumed(folder), whole)


def test_where_the_best_checkpoint_is_damaged_the_last_student_is_kept(made: Path, tmp_path: Path):
    worse = {"optim.lr": 5.0, "optim.schedule": "constant", "optim.warmup_steps": 7}  # after the first validation
    changes = {"checkpoint.keep": 1, "evaluation.compare": []} | worse
    folder, display = tmp_path / "run", Heard()
    stopped(lambda: distill(tiny_run(made, folder, changes)), "_finish", 8)
    best, newest = list_checkpoints(folder / "checkpoints")
    assert step_of(best) == 4
    (best / "student.safetensors").write_bytes(b"")
    resumed(folder, display=display)
    assert any("It was the best by validation" in text for text in display.said)
    assert same_weights(weights(folder), load_file(newest / "student.safetensors"))


def test_a_checkpoint_of_another_student_says_which_tensor_differs(made: Path, tmp_path: Path):
    folder = distill(tiny_run(made, tmp_path / "run"))
    with pytest.raises(StorageError, match="is of another model"):
        resumed(folder, f"student.path={made / 'teacher'}")


class Pressing(Heard):
    """Presses Ctrl-C when a phase has got so far, ``times`` times."""

    def __init__(self, phase: str, at: int, times: int = 1):
        super().__init__()
        self.wanted, self.at, self.times = phase, at, times

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Generator[Advance]:
        with super().phase(name, total, done) as advance:

            def advancing(done: int, *said: Any) -> None:
                advance(done, *said)
                if name.startswith(self.wanted) and done == self.at:
                    for _ in range(self.times):
                        signal.raise_signal(signal.SIGINT)

            yield advancing


def test_ctrl_c_saves_says_how_to_go_on_and_gives_the_handler_back(made: Path, whole: Path, tmp_path: Path):
    handler = signal.getsignal(signal.SIGINT)
    display = Pressing("train", 3)
    with pytest.raises(Interrupted) as caught:
        distill(tiny_run(made, tmp_path / "run"), display)
    assert signal.getsignal(signal.SIGINT) is handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert caught.value.exit_code == 130
    assert "stopped after step 3 of 8; everything is saved" in str(caught.value)
    assert f"distillm train {tmp_path / 'run'} resume=auto" in str(caught.value)
    assert any("press Ctrl-C again to stop at once" in text for text in display.said)
    assert [entry["step"] for entry in events(tmp_path / "run", "interrupted")] == [3]
    assert step_of(list_checkpoints(tmp_path / "run" / "checkpoints")[-1]) == 3
    assert_same_run(resumed(tmp_path / "run"), whole)


def test_a_second_ctrl_c_stops_at_once(made: Path, whole: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        distill(tiny_run(made, tmp_path / "run"), Pressing("train", 5, times=2))
    assert step_of(list_checkpoints(tmp_path / "run" / "checkpoints")[-1]) == 4
    assert_same_run(resumed(tmp_path / "run"), whole)


@pytest.mark.parametrize("phase", ["score the student before", "score the student on", "score the teacher"])
def test_ctrl_c_while_scoring_loses_nothing(made: Path, whole: Path, tmp_path: Path, phase: str):
    with pytest.raises(Interrupted, match=r"what was finished is saved.*resume=auto"):
        distill(tiny_run(made, tmp_path / "run"), Pressing(phase, 3))
    assert_same_run(resumed(tmp_path / "run"), whole)


# ----------------------------------------------------------------------------------------------------- real processes


def process(number: str, pattern: str, count: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m distillm ARGUMENTS``, which is sent a signal at a chosen file operation."""
    command = [sys.executable, killed.__file__, number, pattern, str(count), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_process_stopped_by_ctrl_c_and_then_killed_while_saving_resumes_bit_for_bit(
    made: Path, whole: Path, tmp_path: Path
):
    folder = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(made, folder)), encoding="utf-8")
    # The opens of metrics.jsonl: the first validation, each step, and the time after the checkpoint of step 2.
    asked = process("SIGINT", r"open .*/run/metrics\.jsonl$", 5, "train", str(tmp_path / "run.yaml"))
    assert asked.returncode == 130, asked.stderr
    assert "error: stopped after step 3 of 8; everything is saved. Go on with:" in asked.stderr
    assert f"distillm train {folder} resume=auto" in asked.stderr
    assert "Traceback" not in asked.stderr
    dead = process("SIGKILL", r"open .*step-00000006.*\.partial/state\.json$", 1, "train", str(folder), "resume=auto")
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert list((folder / "checkpoints").glob(".step-00000006.*.partial"))
    assert "Traceback" not in dead.stderr
    assert_same_run(resumed(folder), whole)
    messages = [entry["message"] for entry in events(folder, "resumed")]
    assert messages == ["from step-00000003", "from step-00000004"]


def test_sigterm_saves_and_ends_with_a_code_of_its_own(made: Path, whole: Path, tmp_path: Path):
    folder = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(made, folder)), encoding="utf-8")
    asked = process("SIGTERM", r"open .*/run/metrics\.jsonl$", 5, "train", str(tmp_path / "run.yaml"))
    assert asked.returncode == 143, asked.stderr
    assert "error: stopped after step 3 of 8; everything is saved. Go on with:" in asked.stderr
    assert [entry["message"] for entry in events(folder, "interrupted")] == ["stopped by SIGTERM"]
    assert_same_run(resumed(folder), whole)


@pytest.mark.slow
def test_a_run_killed_at_any_file_operation_resumes_bit_for_bit(made: Path, whole: Path, tmp_path: Path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distillm.pipeline", "killed"])
    reached: set[str] = set()
    for count in range(1, 10_000, 5):
        folder = tmp_path / f"run-{count}"
        child = context.Process(target=killed.die_at, args=(count, settings(made, folder) | {"resume": "auto"}))
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        reached |= _moment(folder)
        distill(tiny_run(made, folder, {"resume": "auto"}))
        assert_same_run(folder, whole)
    assert reached >= {"nothing", "before", "partial", "saved", "retaining", "trained", "student", "scored"}


def _moment(folder: Path) -> set[str]:
    """What a killed run left behind: which of the moments that matter the kill hit."""
    saved = list_checkpoints(folder / "checkpoints")
    steps = lines(folder / "metrics.jsonl", "step") if (folder / "metrics.jsonl").exists() else []
    made = saved and step_of(saved[-1])
    found = {
        "nothing": not (folder / "run.yaml").exists(),
        "before": bool(steps) and not saved,
        "partial": any((folder / "checkpoints").glob(".*.partial")),
        "saved": bool(made) and made == len(steps),
        "retaining": any((folder / "checkpoints").glob(".*.gone")),
        "trained": made == 8 and not (folder / "student").exists(),
        "student": any(folder.glob(".student.*")),
        "scored": (folder / "eval" / "numbers-student.json").exists(),
    }
    return {name for name, holds in found.items() if holds}
