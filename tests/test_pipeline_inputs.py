"""What whole runs do with what they are given: odd models, missing responses, numbers that explode, full disks."""

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from distillm import cli
from distillm.checkpoint import list_checkpoints, step_of
from distillm.errors import ConfigError, DataError, ModelError, StorageError, TrainingError
from distillm.pipeline import distill
from distillm.project import build
from tiny import save, tiny_causal, tiny_tokenizer
from tiny_run import (
    Heard,
    assert_same_run,
    events,
    figures,
    first_losses,
    lines,
    rows,
    scores,
    settings,
    tiny_run,
    weights,
    write_rows,
)

SHORT = {"train.steps": 2, "validation.every": 2, "evaluation.seeds": [1]}
SFT = {"method": {"name": "sft"}, "data.text": None, "student.dropout": 0.0}


@pytest.fixture(name="spawned", scope="module", autouse=True)
def _spawned(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[list[float]]]:
    """Begun first and asked last: a fresh process takes seconds to import everything."""
    wanted = settings(made, tmp_path_factory.mktemp("spawned"))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.submit(first_losses, wanted)


# ------------------------------------------------------------------------------------------------------------- models


def test_different_tokenizers_are_an_error_that_names_the_first_token_that_differs(made: Path, tmp_path: Path):
    tokenizer = tiny_tokenizer()
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    (seventh,) = (token for token, at in told["model"]["vocab"].items() if at == 7)
    del told["model"]["vocab"][seventh]
    told["model"]["vocab"]["§"] = 7
    told["model"]["merges"] = [m for m in told["model"]["merges"] if seventh not in "".join(m)]
    other = tiny_tokenizer()
    other._tokenizer = Tokenizer.from_str(json.dumps(told))  # pyright: ignore[reportPrivateUsage]
    save(tiny_causal(layers=1), other, tmp_path / "student")
    with pytest.raises(
        ModelError, match=r"different tokenizers: token 7 is .* for the teacher and '§' for the student"
    ):
        distill(tiny_run(made, tmp_path / "run", {"student.path": str(tmp_path / "student")}))
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_padded_vocabularies_are_aligned_and_their_padding_is_never_sampled_or_learned(made: Path, tmp_path: Path):
    tokenizer = tiny_tokenizer()
    student, teacher = tiny_causal(vocab_size=304, layers=1, seed=2), tiny_causal(vocab_size=320, seed=1)
    with torch.no_grad():  # the padding would win nearly every draw
        student.lm_head.weight[300:] *= 300
        teacher.lm_head.weight[300:] *= 300
    save(student, tokenizer, tmp_path / "student")
    save(teacher, tokenizer, tmp_path / "teacher")
    display = Heard()
    changes = {"student.path": str(tmp_path / "student"), "teacher.path": str(tmp_path / "teacher")}
    changes |= {"optim.weight_decay": 0.0, "method.initial_probability": 1.0, "generation.max_new_tokens": 8}
    folder = distill(tiny_run(made, tmp_path / "run", changes), display)
    assert any("320 entries and the student's to 304: the 300 they share are used" in text for text in display.said)
    after = weights(folder)["lm_head.weight"]
    assert after.shape == (304, 32)
    assert torch.equal(after[300:], student.lm_head.weight[300:])
    assert not torch.equal(after[:300], student.lm_head.weight[:300])
    state = json.loads((list_checkpoints(folder / "checkpoints")[-1] / "state.json").read_text())
    assert max(token for row in state["buffer"] for token in row["tokens"]) < 300
    assert any(row["predictions"][0] for row in scores(folder)["numbers-teacher.json"]["predictions"])


def test_a_model_folder_without_a_tokenizer_says_what_to_do(made: Path, tmp_path: Path):
    save(tiny_causal(layers=1), None, tmp_path / "bare")
    with pytest.raises(ModelError, match=r"bare holds no tokenizer: copy tokenizer\.json"):
        distill(tiny_run(made, tmp_path / "run", {"student.path": str(tmp_path / "bare")}))
    changes = {"student.path": str(tmp_path / "bare"), "student.tokenizer": str(made / "teacher")}
    folder = distill(tiny_run(made, tmp_path / "run", SHORT | changes))
    assert (folder / "student" / "tokenizer.json").exists()


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_fewer_embeddings_than_tokens_is_an_error(made: Path, tmp_path: Path, role: str):
    save(tiny_causal(vocab_size=290), tiny_tokenizer(), tmp_path / role)
    with pytest.raises(ModelError, match=rf"the {role} has 290 embeddings, fewer than the 300 tokens"):
        distill(tiny_run(made, tmp_path / "run", {f"{role}.path": str(tmp_path / role)}))


def test_students_from_a_configuration_and_from_the_teachers_layers_train(made: Path, tmp_path: Path):
    built = {"config": {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 64}}
    for name, student in {"built": built, "shrunk": {"layers": [0]}}.items():
        folder = distill(tiny_run(made, tmp_path / name, SHORT | {"student": student}))
        assert (folder / "student" / "tokenizer.json").exists()
        measured = lines(folder / "metrics.jsonl", "validation")
        assert measured[-1]["cross_entropy"] != measured[0]["cross_entropy"]


# --------------------------------------------------------------------------------------------------------------- rows


def test_a_teacher_answers_rows_that_have_prompts_only(made: Path, tmp_path: Path):
    train = write_rows(tmp_path / "train.jsonl", rows(6, output=False))
    valid = write_rows(tmp_path / "valid.jsonl", rows(2, 20, output=False))
    test = write_rows(tmp_path / "test.jsonl", rows(1, 40) + rows(1, 41, output=False))
    changes = {"data.train": str(train), "data.validation": str(valid), "data.test": {"mixed": str(test)}}
    changes |= {"data.responses": "teacher", "method": {"name": "kd"}}
    folder = distill(tiny_run(made, tmp_path / "run", SHORT | changes))
    header, *written = lines(folder / "responses.jsonl")
    assert header["teacher"] == str(made / "teacher")
    assert header["decoding"]["temperature"] == 0
    assert len(written) == 6 + 2 + 1
    for sample in lines(folder / "samples.jsonl"):
        assert sample["reference"] == sample["teacher"].strip()
    tested = {row["id"]: row["references"] for row in scores(folder)["mixed-student.json"]["predictions"]}
    assert tested["test:0"] == ["one and five"]
    assert tested["test:1"] != []
    assert tested["test:1"][0] in {row["response"].strip() for row in written}


def test_a_prompt_that_comes_twice_is_answered_once(made: Path, tmp_path: Path):
    train = write_rows(tmp_path / "train.jsonl", rows(3, output=False) * 2)
    changes = {"data.train": str(train), "data.responses": "teacher", "data.responses_temperature": 1.0}
    folder = distill(tiny_run(made, tmp_path / "run", SHORT | changes | {"generation.batch_size": 1, "data.test": {}}))
    assert len(lines(folder / "responses.jsonl")) == 1 + 3 + 4


@pytest.mark.parametrize("purpose", ["train", "validation", "test"])
def test_rows_without_a_response_say_what_to_do(made: Path, tmp_path: Path, purpose: str):
    path = str(write_rows(tmp_path / "bare.jsonl", rows(5) + rows(1, 5, output=False)))
    with pytest.raises(DataError, match=r"bare:5 has no response\..*data\.responses=teacher"):
        distill(tiny_run(made, tmp_path / "run", {f"data.{purpose}": {"bare": path} if purpose == "test" else path}))


def test_shared_responses_are_written_once(made: Path, tmp_path: Path):
    changes = SHORT | {"data.responses": "teacher", "data.responses_file": str(tmp_path / "shared.jsonl")}
    first, second = Heard(), Heard()
    one = distill(tiny_run(made, tmp_path / "one", changes), first)
    before = (tmp_path / "shared.jsonl").read_bytes()
    two = distill(tiny_run(made, tmp_path / "two", changes), second)
    assert (tmp_path / "shared.jsonl").read_bytes() == before
    assert [any(text.startswith("teacher's responses") for text in heard.said) for heard in (first, second)] == [
        True,
        False,
    ]
    assert figures(one) == figures(two)
    assert not (one / "responses.jsonl").exists()
    with pytest.raises(DataError, match=r"shared\.jsonl holds responses of .*delete it, or choose another file"):
        distill(tiny_run(made, tmp_path / "three", changes | {"teacher.path": str(made / "student")}))


def test_rows_are_held_out_for_validation_where_none_are_given(made: Path, tmp_path: Path):
    display = Heard()
    changes = SFT | SHORT | {"data.validation": None, "train.steps": None, "train.epochs": 1, "train.batch_size": 1}
    folder = distill(tiny_run(made, tmp_path / "run", changes), display)
    assert any("2 rows of" in text and "are held out for validation" in text for text in display.said)
    assert len(lines(folder / "metrics.jsonl", "step")) == 10
    write_rows(tmp_path / "few.jsonl", rows(4))
    with pytest.raises(DataError, match=r"too few rows to hold some out; give data\.validation"):
        distill(tiny_run(made, tmp_path / "few", changes | {"data.train": str(tmp_path / "few.jsonl")}))


@pytest.mark.parametrize("responses", ["dataset", "teacher"])
def test_rows_that_are_held_out_for_the_test_keep_their_own_responses(made: Path, tmp_path: Path, responses: str):
    changes = SHORT | {"data.test": {}, "data.test_size": 2, "data.responses": responses, "evaluation.limit": 1}
    folder = distill(tiny_run(made, tmp_path / "run", changes))
    scored = json.loads((folder / "eval" / "held_out-student.json").read_text(encoding="utf-8"))
    (row,) = scored["predictions"]
    number = int(row["id"].removeprefix("train:"))
    assert row["references"] == [rows(12)[number]["output"]]


# ------------------------------------------------------------------------------------------------ numbers that explode


def test_a_loss_that_is_not_finite_ends_the_command_with_what_is_needed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import yaml

    changes = {"optim.lr": 1e30, "optim.warmup_steps": 0, "checkpoint.every": 1, "optim.schedule": "constant"}
    wanted = settings(made, tmp_path / "run", changes | {"method": {"name": "kd"}, "data.test": {}})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(wanted), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["distillm", "train", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    said = capsys.readouterr().err
    assert caught.value.code == 3
    (failed,) = events(tmp_path / "run", "failed")
    last = len(lines(tmp_path / "run" / "metrics.jsonl", "step"))
    assert f"error: step {last + 1}: " in said
    assert "rows of the batch: train:" in said
    assert "Try a lower optim.lr" in said
    assert str(tmp_path / "run") in said
    good = [step_of(path) for path in list_checkpoints(tmp_path / "run" / "checkpoints") if step_of(path) < last]
    assert (f"the last good checkpoint is step {good[-1]}" if good else "no good checkpoint was made") in said
    assert "Traceback" not in said
    assert failed["step"] == last


def test_a_failure_names_the_last_checkpoint_that_is_known_to_be_good(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from distillm import train

    real = train.linear_cross_entropy
    calls = 0

    def poisoned(*arguments: Any) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return real(*arguments) * (float("nan") if calls > 5 else 1.0)

    monkeypatch.setattr("distillm.losses.linear_cross_entropy", poisoned)
    changes = SFT | {"train.micro_batch_size": 3, "checkpoint.every": 1, "validation.every": 8}
    with pytest.raises(TrainingError) as caught:
        distill(tiny_run(made, tmp_path / "run", changes))
    for part in ("step 6: cross_entropy = nan", "rows of the batch: train:", "the last good checkpoint is step 4"):
        assert part in str(caught.value)
    assert "(that of step 5 may hold the fault: delete it" in str(caught.value)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_student_with_damaged_weights_is_refused_before_training(made: Path, tmp_path: Path, name: str):
    save(tiny_causal(layers=1), tiny_tokenizer(), tmp_path / "student")
    poisoned = load_file(tmp_path / "student" / "model.safetensors")
    poisoned[name][:, 5] = float("nan")
    save_file(poisoned, tmp_path / "student" / "model.safetensors", {"format": "pt"})
    changes = SFT | {"data.test": {}, "student.path": str(tmp_path / "student")}
    with pytest.raises(TrainingError) as caught:
        distill(tiny_run(made, tmp_path / "run", changes))
    for said in (
        "step 0: the cross-entropy on the validation rows is nan",
        "weights are damaged",
        "no good checkpoint",
    ):
        assert said in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ the disk


def test_a_run_on_a_full_disk_keeps_its_checkpoints_and_goes_on_when_there_is_room(made: Path, tmp_path: Path):
    whole = distill(tiny_run(made, tmp_path / "whole"))
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:

        class Filling(Heard):
            def note(self, text: str) -> None:
                super().note(text)
                if text.startswith("validation after step 4"):
                    try:
                        with (disk / "ballast").open("wb", buffering=0) as file:
                            while True:
                                file.write(b"\0" * 4096)
                    except OSError:
                        pass

        with pytest.raises(StorageError, match=r"could not write .*No space left on device") as caught:
            distill(tiny_run(made, disk / "run"), Filling())
        assert caught.value.exit_code == 4
        assert [step_of(path) for path in list_checkpoints(disk / "run" / "checkpoints")] == [2, 4]
        (disk / "ballast").unlink()
        distill(tiny_run(made, disk / "run", {"resume": "auto"}))
        assert_same_run(disk / "run", whole)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


# ----------------------------------------------------------------------------------------------------- other processes


def test_a_spawned_process_makes_the_same_steps(made: Path, tmp_path: Path, spawned: Future[list[float]]):
    assert spawned.result(timeout=300) == first_losses(settings(made, tmp_path / "here"))


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_that_accelerate_was_configured_for_are_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ConfigError, match=f"{engine}, whose settings are not read here.*train.shard=true"):
        build(tiny_run(made, tmp_path / "run"))


def test_processes_that_share_nothing_or_cannot_meet_are_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one of 2 processes, and only distillm train shares"):
        build(tiny_run(made, tmp_path / "run"))
    with pytest.raises(ConfigError, match="one of 2 processes, and MASTER_ADDR does not say where they meet"):
        distill(tiny_run(made, tmp_path / "run"))
