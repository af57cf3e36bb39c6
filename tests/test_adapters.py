"""Whole runs with adapters: trained, merged or alone, resumed, as a start, and teachers without their adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from distillm import pipeline
from distillm.checkpoint import list_checkpoints
from distillm.cli import app
from distillm.config import load_run
from distillm.errors import ConfigError
from distillm.models import load_model, load_tokenizer, save_model
from distillm.pipeline import distill
from tiny import save, tiny_causal, tiny_tokenizer
from tiny_run import (
    Heard,
    assert_same_run,
    events,
    lines,
    materials,
    tiny_run,
    weights,
)

LORA = {"student.lora": {"r": 4, "dropout": 0.1}, "data.text": None}


def test_an_adapter_trains_alone_and_is_saved_merged(made: Path, tmp_path: Path) -> None:
    folder = distill(tiny_run(made, tmp_path / "run", LORA | {"optim.lr": 0.05}))
    before = load_model(made / "student", device="cpu").state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder / "student").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("_proj" in name for name in changed)
    saved = list_checkpoints(folder / "checkpoints")[-1] / "student.safetensors"
    assert saved.stat().st_size < (folder / "student" / "model.safetensors").stat().st_size / 3


def test_a_run_with_an_adapter_goes_on_bit_for_bit(made: Path, tmp_path: Path) -> None:
    whole = distill(tiny_run(made, tmp_path / "whole", LORA))
    short = tiny_run(made, tmp_path / "run", LORA)
    original = pipeline._log_step  # pyright: ignore[reportPrivateUsage]

    def log(project: Any, step: Any) -> None:
        if step.step == 5:
            raise KeyError
        original(project, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_log_step", log)
        with pytest.raises(KeyError):
            distill(short)
    folder = distill(load_run(str(tmp_path / "run"), ["resume=auto"]))
    assert_same_run(folder, whole)


def test_an_adapter_saved_alone_is_a_model_for_transformers_and_a_teacher_for_us(made: Path, tmp_path: Path) -> None:
    alone = distill(tiny_run(made, tmp_path / "alone", LORA | {"student.lora": {"r": 4, "merge": False}}))
    merged = distill(tiny_run(made, tmp_path / "merged", LORA | {"student.lora": {"r": 4}}))
    assert (alone / "student" / "adapter_model.safetensors").is_file()
    assert not (alone / "student" / "model.safetensors").exists()
    ids = torch.tensor([[5, 9, 17, 4]])
    logits = [
        AutoModelForCausalLM.from_pretrained(folder / "student").eval()(input_ids=ids).logits
        for folder in (alone, merged)
    ]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    again = {"student.path": str(alone / "student"), "student.lora": {"merge": False}}
    with pytest.raises(ConfigError, match="others cannot load as a base"):
        distill(tiny_run(made, tmp_path / "again", LORA | again))
    changes = {"teacher.path": str(alone / "student"), "train.steps": 2, "data.text": None}
    distill(tiny_run(made, tmp_path / "next", changes))


@pytest.mark.parametrize("name", ["distillm", "minillm", "distillm2", "seqkd"])
def test_a_student_is_distilled_from_itself_with_more_to_read(name: str, made: Path, tmp_path: Path) -> None:
    changes = LORA | {
        "teacher": {"adapter_off": True},
        "method": {"name": name} | ({"teacher_mix": 0} if name == "minillm" else {}),
        "data.teacher_template": "Answer with the two words. Q: {{ instruction }}\nA: ",
        "student.lora": {"r": 4},
        "student.dropout": None,
    }
    heard = Heard()
    folder = distill(tiny_run(made, tmp_path / "run", changes), heard)
    assert len(lines(folder / "metrics.jsonl", "step")) == 8
    validations = lines(folder / "metrics.jsonl", "validation")
    assert validations[0]["divergence"] > 0  # nothing is learned yet: they differ by what they read
    assert weights(folder)
    assert not events(folder, "failed")
    scored = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (folder / "eval").glob("*.json")}
    said = {system: scored[f"numbers-{system}"]["predictions"] for system in ("before", "teacher")}
    assert [r["predictions"] for r in said["before"]] != [r["predictions"] for r in said["teacher"]]
    result = CliRunner().invoke(app, ["eval", str(folder), "--data", str(made / "test.jsonl")])
    assert result.exit_code == 0, result.output


def test_without_more_to_read_a_teacher_that_is_the_student_agrees_with_it_at_first(made: Path, tmp_path: Path) -> None:
    changes = LORA | {"teacher": {"adapter_off": True}, "method": {"name": "kd"}, "train.steps": 2}
    folder = distill(tiny_run(made, tmp_path / "run", changes))
    first, *later = lines(folder / "metrics.jsonl", "validation")
    assert first["divergence"] == pytest.approx(0, abs=1e-6)
    assert later


def test_lora_says_what_it_cannot_do(made: Path, tmp_path: Path) -> None:
    changes = LORA | {"student.lora": {"targets": ["no_such_layer"]}}
    with pytest.raises(ConfigError, match=r"student\.lora\.targets"):
        distill(tiny_run(made, tmp_path / "run", changes))


@pytest.mark.parametrize("changes", [{}, {"student.lora": {"r": 2}, "student.dropout": None}])
def test_a_student_that_starts_from_an_adapters_folder_is_saved_whole(
    made: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    first = distill(tiny_run(made, tmp_path / "first", LORA | {"student.lora": {"r": 4, "merge": False}}))
    again = {"student.path": str(first / "student"), "data.text": None, "train.steps": 2} | changes
    student = distill(tiny_run(made, tmp_path / "again", again)) / "student"
    saved = load_file(student / "model.safetensors")
    assert saved.keys() == load_file(made / "student" / "model.safetensors").keys()
    AutoModelForCausalLM.from_pretrained(student)
    load_model(student, device="cpu")


def assert_merged_where_it_is_read(model: Any, made: Path, folder: Path) -> None:
    """The adapter of ``model``, saved in ``folder`` and read, answers as ``model`` does, and so when saved again."""
    model.save_pretrained(folder)
    ids = torch.tensor([[5, 9, 17, 4]])
    loaded = load_model(folder, device="cpu")
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    save_model(loaded, load_tokenizer(made / "teacher"), folder / "saved")
    torch.testing.assert_close(load_model(folder / "saved", device="cpu")(ids).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # of the student: its head is trained alone
@pytest.mark.parametrize("base", ["teacher", "student"])
def test_an_adapter_with_layers_that_were_trained_whole_is_merged(made: Path, tmp_path: Path, base: str) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(made / base),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
    )
    with torch.no_grad():
        model.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").mul_(2)
    assert_merged_where_it_is_read(model, made, tmp_path)
    assert not json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_an_adapter_of_some_tokens_is_merged(made: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(made / "teacher"),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 9], init_lora_weights=False),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1)
    assert_merged_where_it_is_read(model, made, tmp_path)


def test_gpt2_takes_an_adapter_too(tmp_path: Path) -> None:
    made = materials(tmp_path / "made")
    tokenizer = tiny_tokenizer()
    save(tiny_causal("gpt2", layers=1, seed=2), tokenizer, made / "student")
    folder = distill(tiny_run(made, tmp_path / "run", LORA | {"student.dropout": None}))
    AutoModelForCausalLM.from_pretrained(folder / "student")
