"""The run folder: refused, resumed, overwritten; lines, checkpoints and scores that come and go."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillm.checkpoint import CHECKSUMS, list_checkpoints, step_of
from distillm.errors import ConfigError, StorageError
from distillm.folder import RunFolder


def a_run(path: Path) -> RunFolder:
    """A folder as a finished run leaves it, and a file of the user's own beside."""
    folder = RunFolder(path)
    folder.open(resume=False, overwrite=False)
    for step in (4, 8):
        (folder.checkpoints / f"step-{step:08d}").mkdir()
        (folder.checkpoints / f"step-{step:08d}" / CHECKSUMS).write_text("{}")
    folder.student.mkdir()
    (path / "distillm").mkdir()  # a tracker's
    for name in ("run.yaml", "samples.jsonl", "tokens.jsonl", "responses.jsonl", "report.html", "notes.txt"):
        (path / name).write_text(name)
    folder.append("metrics.jsonl", {"kind": "step", "step": 8})
    folder.write_eval("dolly-student", {"scores": {}})
    return folder


def names(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


@pytest.mark.parametrize("left", ["run.yaml", "metrics.jsonl", "checkpoints/step-00000004"])
def test_a_folder_that_holds_a_run_is_refused_and_untouched(tmp_path: Path, left: str):
    path = tmp_path / left
    path.mkdir(parents=True) if "step" in left else path.write_text("kept")
    before = names(tmp_path)
    with pytest.raises(ConfigError) as caught:
        RunFolder(tmp_path).open(resume=False, overwrite=False)
    for part in (f"{tmp_path} already holds a run", "resume=auto", "overwrite=true", "output="):
        assert part in str(caught.value)
    assert names(tmp_path) == before


def test_resuming_finds_the_newest_whole_checkpoint_and_sweeps_scratch(tmp_path: Path):
    folder = a_run(tmp_path)
    (folder.checkpoints / ".step-00000012.99.partial").mkdir()
    (folder.checkpoints / ".step-00000001.99.old").mkdir()
    (tmp_path / ".student.99.partial").mkdir()
    (tmp_path / "eval" / ".dolly-teacher.json.99.partial").write_text("{")
    found = folder.open(resume=True, overwrite=False)
    assert found == folder.checkpoints / "step-00000008"
    assert not list(tmp_path.rglob(".*"))
    assert (tmp_path / "eval" / "dolly-student.json").exists()


def test_resuming_an_empty_folder_begins(tmp_path: Path):
    assert RunFolder(tmp_path / "deep" / "new").open(resume=True, overwrite=False) is None


def test_a_finished_student_without_checkpoints_is_not_trained_anew_in_silence(tmp_path: Path):
    folder = a_run(tmp_path)
    for checkpoint in list_checkpoints(folder.checkpoints):
        shutil.rmtree(checkpoint)
    before = names(tmp_path)
    with pytest.raises(
        ConfigError, match=r"no checkpoint to go on from: they were deleted. Score it by `distillm eval`"
    ):
        folder.open(resume=True, overwrite=False)
    assert names(tmp_path) == before
    assert folder.open(resume=False, overwrite=True) is None
    assert folder.open(resume=True, overwrite=True) is None  # the error's advice, where run.yaml says resume: auto
    folder.clear()
    assert "student" not in names(tmp_path)


def test_a_finished_run_whose_checkpoints_are_all_damaged_is_begun_anew_when_that_is_asked_for(tmp_path: Path):
    folder = a_run(tmp_path)
    for checkpoint in list_checkpoints(folder.checkpoints):
        (checkpoint / CHECKSUMS).write_text("{")
    with pytest.raises(StorageError, match=r"No whole checkpoint is left: overwrite=true begins the run anew"):
        folder.open(resume=True, overwrite=False)
    assert folder.open(resume=True, overwrite=True) is None


def test_one_run_at_a_time_works_in_a_folder(tmp_path: Path):
    taken = pytest.raises(ConfigError, match=r"another process is at work in .*a: wait for it, or stop it")
    with RunFolder(tmp_path / "a").held(), RunFolder(tmp_path / "b").held(), taken, RunFolder(tmp_path / "a").held():
        pass
    with RunFolder(tmp_path / "a").held():
        assert names(tmp_path / "a") == []


def test_resuming_wins_over_overwriting(tmp_path: Path):
    assert a_run(tmp_path).open(resume=True, overwrite=True) is not None


def test_overwriting_removes_all_of_the_old_run_and_nothing_of_the_users(tmp_path: Path):
    folder = a_run(tmp_path)
    before = names(tmp_path)
    assert folder.open(resume=False, overwrite=True) is None
    assert names(tmp_path) == before  # nothing goes before the new run is known to start
    folder.clear()
    assert names(tmp_path) == ["checkpoints", "eval", "notes.txt"]


@pytest.mark.parametrize("asked", [{"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}])
def test_a_student_folder_that_no_run_wrote_is_never_replaced(tmp_path: Path, asked: dict[str, bool]):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match=r"student is there already, and no run wrote it; choose another output"):
        RunFolder(tmp_path).open(**asked)
    assert names(tmp_path) == ["student", "student/model.safetensors"]


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"could not make the run folder .*file"):
        RunFolder(tmp_path / "file" / "run").open(resume=False, overwrite=False)


def test_a_line_that_cannot_be_written_says_so(tmp_path: Path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"could not write .*metrics\.jsonl.*The checkpoints are whole"):
        RunFolder(tmp_path).append("metrics.jsonl", {"step": 1})


def test_lines_keep_any_text_on_one_line_each(tmp_path: Path):
    texts = ["a\nb\r\n", "\u2028 \u0085", '"{', "é 漢 🙂", ""]
    for text in texts:
        RunFolder(tmp_path).append("samples.jsonl", {"step": 1, "student": text})
    RunFolder(tmp_path).forget_after(1)
    found = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["student"] for line in found if line] == texts


@settings(deadline=None, max_examples=60)
@given(steps=st.lists(st.integers(0, 9), max_size=8), kept=st.integers(-1, 9), torn=st.data())
def test_forgetting_drops_later_lines_and_a_torn_last_one(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], kept: int, torn: st.DataObject
):
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    for step in steps:
        folder.append("metrics.jsonl", {"kind": "step", "step": step, "text": "é"})
    path = folder.path / "metrics.jsonl"
    line = json.dumps({"kind": "step", "step": 0, "text": "é"}, ensure_ascii=False).encode()
    cut = torn.draw(st.integers(0, len(line) - 1))
    with path.open("ab") as file:
        file.write(line[:cut])
    folder.forget_after(kept)
    found = [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert found == [step for step in steps if step <= kept]
    folder.append("metrics.jsonl", {"step": 10})  # and the next line is whole
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[-1]) == {"step": 10}


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, None, [3, 4]),
        (2, 1, [1, 3, 4]),
        (2, 4, [3, 4]),
        (1, 2, [2, 4]),
        (1, 9, [4]),
        (7, None, [1, 2, 3, 4]),
    ],
)
def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path: Path, keep: int, best: int | None, left: list[int]):
    folder = RunFolder(tmp_path)
    folder.open(resume=False, overwrite=False)
    for step in (1, 2, 3, 4):
        (folder.checkpoints / f"step-{step:08d}").mkdir()
        (folder.checkpoints / f"step-{step:08d}" / "state.json").write_text("{}")
    folder.retain(keep, best)
    assert [step_of(path) for path in list_checkpoints(folder.checkpoints)] == left
    assert len(list(folder.checkpoints.iterdir())) == len(left)


def test_a_checkpoint_is_out_of_the_list_before_any_of_its_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = a_run(tmp_path)

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if Path(path).exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("distillm.checkpoint.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.retain(1, None)
    assert [step_of(path) for path in list_checkpoints(folder.checkpoints)] == [8]


def test_scores_are_forgotten_by_system_by_data_or_all(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.open(resume=False, overwrite=False)

    def left() -> list[str]:
        return sorted(p.stem for p in (tmp_path / "eval").iterdir())

    def write() -> None:
        for data in ("a", "a-2", "b.1"):
            for system in ("before", "student"):
                folder.write_eval(f"{data}-{system}", {"data": data, "scores": {}, "predictions": []})

    write()
    assert folder.has_eval("a-student")
    folder.forget_eval(system="student")
    assert left() == ["a-2-before", "a-before", "b.1-before"]
    assert not folder.has_eval("a-student")
    write()
    folder.forget_eval(data="a")
    assert left() == ["a-2-before", "a-2-student", "b.1-before", "b.1-student"]
    write()
    folder.forget_eval()
    assert left() == []


@pytest.mark.parametrize("text", ["", "{", "3", "[]", '{"data": "a"}', '{"scores": 1, "predictions": []}'])
def test_scores_that_cannot_be_read_are_not_there(tmp_path: Path, text: str):
    folder = a_run(tmp_path)
    folder.write_eval("a-student", {"scores": {}, "predictions": []})
    assert folder.has_eval("a-student")
    (tmp_path / "eval" / "a-student.json").write_text(text)
    assert not folder.has_eval("a-student")


@pytest.mark.parametrize("harm", ["nothing", "torn", "a line", "all"])
def test_a_log_that_lacks_steps_is_told_and_one_that_was_torn_by_a_kill_is_not(tmp_path: Path, harm: str):
    folder = RunFolder(tmp_path)
    folder.open(resume=False, overwrite=False)
    for step in range(1, 6):
        folder.append("metrics.jsonl", {"kind": "step", "step": step})
        folder.append("samples.jsonl", {"step": step, "student": "text"})
    log = tmp_path / "metrics.jsonl"
    kept = log.read_text().splitlines(keepends=True)
    changed = {"nothing": kept, "torn": [*kept, '{"kind'], "a line": [*kept[:2], "?\n", *kept[3:]], "all": []}[harm]
    log.write_text("".join(changed))
    folder.forget_after(4)
    missing = {"a line": 1, "all": 4}.get(harm)
    assert len(folder.damaged) == (missing is not None)
    assert missing is None or f"lacks {missing} of the 4 steps" in folder.damaged[0]
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 4


def test_what_cannot_be_deleted_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = a_run(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("distillm.folder.remove", refuse)
    with pytest.raises(StorageError, match=r"could not change .*checkpoints.*Read-only file system"):
        folder.retain(1, None)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(StorageError, match="could not change"):
        folder.forget_eval()
