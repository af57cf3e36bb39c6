"""Checkpoints: everything comes back, whole or not at all."""

import hashlib
import json
import os
import random
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from distillm.checkpoint import (
    CHECKSUMS,
    check,
    list_checkpoints,
    load_checkpoint,
    load_student,
    newest_whole,
    remove,
    save_checkpoint,
    step_of,
    sweep,
    written_aside,
)
from distillm.errors import StorageError, TrainingError
from distillm.sources import ReplayBuffer
from distillm.train import parameter_groups
from distillm.types import Example, State
from distillm.writing import write_text
from tiny import tiny_causal

ROWS = [
    Example("train:1", [3, 4, 5], [False, True, True], "student", born=7),
    Example("train:2", [6, 7], [False, True], "student", born=9, teacher_context=[1, 2, 3]),
]


def optimizer_of(model: Any, **changes: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model, changes.pop("weight_decay", 0.01)), lr=0.01, **changes)


def trained(seed: int = 0, steps: int = 2, **config: Any) -> tuple[Any, torch.optim.AdamW]:
    model = tiny_causal(layers=1, seed=seed, **config).train()
    optimizer = optimizer_of(model)
    for step in range(steps):
        ids = torch.tensor([[5 + step, 6, 7, 8]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def reseal(checkpoint: Path) -> None:
    """Make the checksums those of the files as they are."""
    files = [path for path in checkpoint.iterdir() if path.name != CHECKSUMS]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (checkpoint / CHECKSUMS).write_text(json.dumps(found), encoding="utf-8")


def state_of() -> State:
    return State(step=12, total_steps=40, validation=[2.0, 1.5, 1 / 3])


def buffer_of(rows: list[Example], capacity: int = 5) -> ReplayBuffer:
    buffer = ReplayBuffer(capacity)
    buffer.rows.extend(rows)
    return buffer


def saved(
    folder: Path, seed: int = 0, extra: Any = None, step: int = 12, **config: Any
) -> tuple[Path, Any, torch.optim.AdamW]:
    (model, optimizer), state = trained(seed, **config), state_of()
    state.step = step
    return save_checkpoint(folder, model, optimizer, state, buffer_of(ROWS), extra), model, optimizer


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_brings_back_weights_moments_state_buffer_and_extra(tmp_path: Path, tied: bool):
    extra = {"best": [1.5, 8], "texts": {"a": "é\u2028\n"}}
    checkpoint, model, optimizer = saved(tmp_path, extra=extra, tie_word_embeddings=tied)
    other, fresh = trained(seed=5, steps=0, tie_word_embeddings=tied)
    state, buffer = State(), buffer_of([Example("old", [1], [False])])
    back = load_checkpoint(checkpoint, other, fresh, state, buffer)
    assert same(other.state_dict(), model.state_dict())
    assert (other.get_input_embeddings().weight is other.get_output_embeddings().weight) == tied
    before, after = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert before.keys() == after.keys()
    assert all(same(before[i], after[i]) for i in before)
    assert state == state_of()
    assert list(buffer.rows) == ROWS
    assert buffer.rows.maxlen == 5
    assert back == {"extra": extra, "threads": torch.get_num_threads(), "processes": 1}


def test_training_goes_on_from_a_checkpoint_as_it_would_have_gone_on_without(tmp_path: Path):
    checkpoint, model, optimizer = saved(tmp_path, attention_dropout=0.3)
    other, fresh = trained(seed=5, steps=0, attention_dropout=0.3)

    def one_more(student: Any, steps: torch.optim.AdamW) -> dict[str, torch.Tensor]:
        student.train()
        ids = torch.tensor([[9, 8, 7, 6]])
        student(input_ids=ids, labels=ids).loss.backward()
        steps.step()
        return student.state_dict()

    state = torch.get_rng_state()
    load_checkpoint(checkpoint, other, fresh, State(), ReplayBuffer(1))
    resumed = one_more(other, fresh)
    torch.set_rng_state(state)
    assert same(resumed, one_more(model, optimizer))


def test_the_next_draws_of_every_global_generator_come_back(tmp_path: Path):
    def draws() -> tuple[Any, ...]:
        return (random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.rand(3).tolist())

    random.gauss(0, 1)  # gauss and normal each keep a second value for the next call
    np.random.normal()
    checkpoint, model, optimizer = saved(tmp_path)
    expected = draws()
    assert draws() != expected
    load_checkpoint(checkpoint, model, optimizer, State(), ReplayBuffer(1))
    assert draws() == expected


def test_a_checkpoint_before_any_update_has_no_moments_and_comes_back(tmp_path: Path):
    model, optimizer = trained(steps=0)
    checkpoint = save_checkpoint(tmp_path, model, optimizer, state_of(), ReplayBuffer(3), None)
    other, fresh = trained(seed=5, steps=1)
    load_checkpoint(checkpoint, other, fresh, State(), ReplayBuffer(3))
    assert fresh.state_dict()["state"] == {}
    assert same(other.state_dict(), model.state_dict())


def test_settings_of_the_optimizer_are_those_of_the_resumed_run(tmp_path: Path):
    checkpoint, model, _ = saved(tmp_path)
    fresh = optimizer_of(model, weight_decay=0.5, betas=(0.8, 0.9))
    load_checkpoint(checkpoint, model, fresh, State(), ReplayBuffer(1))
    assert [group["weight_decay"] for group in fresh.param_groups] == [0.5, 0.0]
    assert fresh.param_groups[0]["betas"] == (0.8, 0.9)


def test_a_checkpoint_holds_safetensors_and_json_only(tmp_path: Path):
    checkpoint, *_ = saved(tmp_path)
    assert {path.suffix for path in checkpoint.iterdir()} == {".safetensors", ".json"}
    for path in checkpoint.iterdir():
        load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text(encoding="utf-8"))


def test_tied_weights_are_kept_once(tmp_path: Path):
    tied, *_ = saved(tmp_path / "tied", tie_word_embeddings=True)
    untied, *_ = saved(tmp_path / "untied", tie_word_embeddings=False)
    names = [set(load_file(folder / "student.safetensors")) for folder in (tied, untied)]
    assert names[1] - names[0] == {"lm_head.weight"}


def test_only_whole_checkpoints_are_listed_oldest_first(tmp_path: Path):
    assert list_checkpoints(tmp_path / "none") == []
    for name in ("step-00000012", "step-00000002", "step-00000100", ".step-00000300.5.partial", ".step-00000400.5.old"):
        (tmp_path / name).mkdir()
    for name in ("step-3", "step-00000005.partial", "step-0000000x", "other"):
        (tmp_path / name).mkdir()
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [2, 12, 100]


@pytest.mark.parametrize("name", ["student.safetensors", "optimizer.safetensors", "generators.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_damaged_tensor_file_is_named_with_what_to_do(tmp_path: Path, name: str, damage: str):
    checkpoint, model, optimizer = saved(tmp_path)
    path = checkpoint / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "truncated" else 0])
    with pytest.raises(StorageError, match=rf"step-00000012 is damaged.*{name} is not as it was written"):
        load_checkpoint(checkpoint, model, optimizer, State(), ReplayBuffer(1))


@pytest.mark.parametrize("text", ["", "{", "\x00\x00", "{}", "[]", "null", '{"state": {"step": 1}}', '{"state": 3}'])
def test_garbage_in_the_state_is_a_damaged_checkpoint(tmp_path: Path, text: str):
    checkpoint, model, optimizer = saved(tmp_path)
    (checkpoint / "state.json").write_text(text, encoding="utf-8")
    with pytest.raises(StorageError, match=r"is damaged.*state\.json is not as it was written"):
        load_checkpoint(checkpoint, model, optimizer, State(), ReplayBuffer(1))
    reseal(checkpoint)
    with pytest.raises(StorageError, match="is damaged"):
        load_checkpoint(checkpoint, model, optimizer, State(), ReplayBuffer(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["weights", "averages"])
def test_what_is_not_finite_is_not_saved_and_takes_no_place(tmp_path: Path, what: str, value: float):
    first, model, optimizer = saved(tmp_path)
    before = tree(tmp_path)
    weight = next(model.parameters())
    spoiled = weight.data if what == "weights" else optimizer.state[weight]["exp_avg_sq"]
    spoiled.view(-1)[-1] = value
    with pytest.raises(TrainingError, match=rf"step 13: .*{what} are no longer finite .*no checkpoint was written"):
        save_checkpoint(tmp_path, model, optimizer, State(step=13), ReplayBuffer(1), None)
    assert tree(tmp_path) == before
    assert list_checkpoints(tmp_path) == [first]


FILES = ["student.safetensors", "optimizer.safetensors", "generators.safetensors", "state.json", CHECKSUMS]


@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
@settings(max_examples=200)
def test_any_flipped_bit_of_a_checkpoint_is_found(kept: Path, name: str, where: float, bit: int):
    path = kept / name
    whole = path.read_bytes()
    at = int(where * len(whole))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    try:
        with pytest.raises(StorageError, match="is damaged"):
            check(kept)
    finally:
        path.write_bytes(whole)
    check(kept)


@pytest.fixture(name="kept", scope="module")
def _kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint, *_ = saved(tmp_path_factory.mktemp("kept"))
    return checkpoint


def test_the_newest_whole_checkpoint_is_found_and_damaged_ones_are_set_aside(tmp_path: Path):
    made = [saved(tmp_path, step=step)[0] for step in (2, 4, 6)]
    (made[2] / "state.json").unlink()
    (made[1] / "student.safetensors").write_bytes(b"")
    found, said = newest_whole(tmp_path)
    assert found == made[0]
    assert len(said) == 2
    assert "state.json is not as it was written" in said[0]
    assert "set aside as damaged-step-00000006" in said[0]
    assert list_checkpoints(tmp_path) == [made[0]]
    assert (tmp_path / "damaged-step-00000004" / "state.json").is_file()
    assert newest_whole(tmp_path) == (made[0], [])


def test_foreign_generators_are_a_damaged_checkpoint(tmp_path: Path):
    checkpoint, model, optimizer = saved(tmp_path)
    save_file({"cpu": torch.zeros(3, dtype=torch.uint8)}, checkpoint / "generators.safetensors")
    reseal(checkpoint)
    with pytest.raises(StorageError, match="is damaged"):
        load_checkpoint(checkpoint, model, optimizer, State(), ReplayBuffer(1))


@pytest.mark.parametrize("change", [{"hidden_size": 16}, {"layers": 2}, {"tie_word_embeddings": True}])
def test_a_checkpoint_of_another_model_names_the_first_tensor_that_differs(tmp_path: Path, change: dict[str, Any]):
    checkpoint, *_ = saved(tmp_path)
    other = tiny_causal(**{"layers": 1} | change)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(StorageError, match=r"is of another model: \S+weight has the shape"):
        load_student(other, checkpoint)
    assert same(before, other.state_dict())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
def test_a_failure_while_writing_leaves_the_old_folder_whole_and_no_scratch(tmp_path: Path, error: BaseException):
    target = tmp_path / "student"
    with written_aside(target) as scratch:
        (scratch / "deep").mkdir()
        (scratch / "deep" / "a").write_text("old")
    expected = StorageError if isinstance(error, OSError) else type(error)

    def fail() -> None:
        with written_aside(target) as scratch:
            (scratch / "a").write_text("half")
            raise error

    with pytest.raises(expected) as caught:
        fail()
    assert tree(tmp_path) == {"student/deep/a": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    if isinstance(error, OSError):
        assert f"could not write {target}" in str(caught.value)
        assert "No space left" in str(caught.value)
        assert "Nothing that was saved before is lost" in str(caught.value)


def test_a_folder_is_replaced_whole(tmp_path: Path):
    for text in ("old", "new"):
        with written_aside(tmp_path / "student") as scratch:
            (scratch / text).write_text(text)
    assert tree(tmp_path) == {"student/new": b"new"}


def test_a_failed_replacement_of_a_file_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "run.yaml"
    write_text(path, "old")
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, kept[1]))
    try:
        with pytest.raises(StorageError, match=r"could not write .*run\.yaml.*Nothing that was saved before is lost"):
            write_text(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert tree(tmp_path) == {"run.yaml": b"old"}


def test_sweeping_removes_scratch_and_nothing_else(tmp_path: Path):
    for name in (".step-00000002.7.partial", ".step-00000002.7.old", ".step-1.7.gone", "step-00000002", ".git"):
        (tmp_path / name).mkdir()
    (tmp_path / ".run.yaml.7.partial").write_text("half")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".git", "step-00000002"]


def test_a_checkpoint_whose_removal_was_killed_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, *_ = saved(tmp_path)

    def killed(doomed: Path, **_: Any) -> None:
        (doomed / CHECKSUMS).unlink(missing_ok=True)
        if doomed.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("distillm.checkpoint.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove(checkpoint)
    assert len(list(tmp_path.iterdir())) == 1
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_told_by_the_tokenizers_package_is_put_in_words(tmp_path: Path) -> None:
    def fail(error: Exception) -> None:
        with written_aside(tmp_path / "student"):
            raise error

    with pytest.raises(StorageError, match=r"could not write .*No space left"):
        fail(Exception("No space left on device (os error 28)"))
    with pytest.raises(Exception, match=r"^something else$"):
        fail(Exception("something else"))


def test_sweeping_puts_back_what_was_set_aside_when_nothing_took_its_place(tmp_path: Path):
    (tmp_path / ".student.7.old").mkdir()
    (tmp_path / ".student.7.old" / "model.safetensors").write_text("mine")
    sweep(tmp_path)
    assert (tmp_path / "student" / "model.safetensors").read_text() == "mine"


@pytest.fixture(name="small_disk", params=["a full disk", "a file size limit"])
def _small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder that has room for one checkpoint and no more: a small file system, or a limit on each file."""
    if request.param == "a full disk":
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(tmp_path)], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip("mounting a small file system is not allowed here; the file size limit stands for it")
        try:
            yield tmp_path
        finally:
            subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
    else:
        yield tmp_path


def test_a_full_disk_while_saving_leaves_the_checkpoint_before_whole(small_disk: Path):
    model, optimizer = trained()
    first = save_checkpoint(small_disk, model, optimizer, State(step=1), ReplayBuffer(1), None)
    before = tree(small_disk)
    size = sum(map(len, before.values()))
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    mounted = os.path.ismount(small_disk)
    assert not mounted or 200_000 < size < 400_000
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 3, kept[1]))
    try:
        with pytest.raises(StorageError, match=r"could not write .*step-00000002: .*Nothing that was saved before"):
            save_checkpoint(small_disk, model, optimizer, State(step=2), ReplayBuffer(1), None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert tree(small_disk) == before
    assert [path.name for path in small_disk.iterdir()] == [first.name]
    load_checkpoint(first, *trained(seed=4), State(), ReplayBuffer(1))
