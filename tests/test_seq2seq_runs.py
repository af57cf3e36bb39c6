"""Whole runs of encoder-decoders: every method, layers of a teacher, adapters, interruption, `eval` and `generate`."""

import json
import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from typer.testing import CliRunner

from distillm.cli import app
from distillm.errors import ConfigError, Interrupted, ModelError
from distillm.methods import METHODS
from distillm.models import layout_of, load_model
from distillm.pipeline import distill
from distillm.types import Layout
from tiny import save, tiny_seq2seq, tiny_tokenizer
from tiny_run import Heard, assert_same_run, lines, materials, tiny_run

KINDS = ["t5", "bart", "marian"]
SHORT = {"train.steps": 3, "validation.every": 3, "data.text": None, "evaluation.seeds": [1]}


@pytest.fixture(name="made", scope="module", params=KINDS)
def _made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return materials(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize(
    ("made", "method"),
    [(kind, method) for kind in KINDS for method in METHODS if kind == "t5" or method in ("distillm", "minillm")],
    indirect=["made"],
)
def test_every_method_and_every_family(made: Path, method: str, tmp_path: Path) -> None:
    run = tiny_run(made, tmp_path / "run", SHORT | {"method": {"name": method}})
    folder = distill(run)
    steps = lines(folder / "metrics.jsonl", "step")
    assert [s["step"] for s in steps] == [1, 2, 3]
    assert all(s["loss"] is not None and s["grad_norm"] > 0 for s in steps)
    scores = json.loads((folder / "eval" / "numbers-student.json").read_text())["scores"]
    assert scores["divergence"]["mean"] > 0
    student = AutoModelForSeq2SeqLM.from_pretrained(folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    ids = tokenizer("one two", return_tensors="pt")
    assert student.generate(**ids, max_new_tokens=3).shape[0] == 1


def test_a_student_of_a_teachers_layers_with_another_depth_of_decoder(made: Path, tmp_path: Path) -> None:
    run = tiny_run(
        made,
        tmp_path / "run",
        SHORT | {"student": {"layers": 2, "decoder_layers": [0]}, "method": {"name": "distillm"}},
    )
    config: Any = load_model(distill(run) / "student", device="cpu").config
    depths = {name: value for name, value in config.to_dict().items() if name.endswith("layers") and value}
    assert set(depths.values()) == {1, 2}


def test_an_adapter_on_an_encoder_decoder(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run = tiny_run(made, tmp_path / "run", SHORT | {"student.lora": {"r": 2}, "student.dropout": None})
    assert (distill(run) / "student" / "model.safetensors").exists()
    alone = tiny_run(
        made, tmp_path / "alone", SHORT | {"student.lora": {"r": 2, "merge": False}, "student.dropout": None}
    )
    settings = json.loads((distill(alone) / "student" / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_2_SEQ_LM"
    own = {"student.lora": {"r": 2}, "student.dropout": None, "teacher": {"adapter_off": True}}
    distill(tiny_run(made, tmp_path / "own", SHORT | own))


@pytest.mark.parametrize("made", ["bart"], indirect=True)
def test_a_teacher_whose_decoder_starts_with_another_token(made: Path, tmp_path: Path) -> None:
    other = made / "starts-with-4"
    save(tiny_seq2seq("bart", layers=1, seed=2, decoder_start_token_id=4), tiny_tokenizer(), other)
    changes = SHORT | {"student.path": str(other), "evaluation.compare": ["teacher"]}
    folder = distill(tiny_run(made, tmp_path / "run", changes))
    alone = distill(tiny_run(made, tmp_path / "alone", SHORT | {"evaluation.compare": ["teacher"]}))
    scores = [json.loads((f / "eval" / "numbers-teacher.json").read_text())["scores"] for f in (folder, alone)]
    assert scores[0] == scores[1]
    with pytest.raises(ConfigError, match=r"their decoders start with different ones; set method.teacher_mix=0"):
        distill(tiny_run(made, tmp_path / "minillm", changes | {"method": {"name": "minillm"}}))


def test_an_interrupted_run_goes_on_bit_for_bit(made: Path, tmp_path: Path) -> None:
    whole = distill(tiny_run(made, tmp_path / "whole"))
    run = tiny_run(made, tmp_path / "cut")

    class Stops(Heard):
        @contextmanager
        def phase(self, name: str, total: int, done: int = 0) -> Generator[Any]:
            with super().phase(name, total, done) as advance:

                def check(*units: Any) -> None:
                    advance(*units)
                    if name == "train" and units[0] == 5:
                        os.kill(os.getpid(), signal.SIGINT)

                yield check

    with pytest.raises(Interrupted):
        distill(run, Stops())
    distill(run.model_copy(update={"resume": "auto"}))
    assert_same_run(whole, tmp_path / "cut")


def test_eval_and_generate_read_the_model(made: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    asked = ["eval", str(made / "student"), "--data", str(made / "test.jsonl"), "--output", str(output)]
    result = CliRunner().invoke(
        app, [*asked, "--teacher", str(made / "teacher"), "--seeds", "1", "--max-new-tokens", "4"]
    )
    assert result.exit_code == 0, result.output
    assert "divergence" in json.loads(output.read_text())["scores"]
    result = CliRunner().invoke(app, ["generate", str(made / "student"), "Say one.", "--max-new-tokens", "4"])
    assert result.exit_code == 0, result.output


def test_prompt_and_response_have_room_each_for_itself(made: Path, tmp_path: Path) -> None:
    run = tiny_run(made, tmp_path / "run", SHORT | {"generation.max_new_tokens": 300, "train.steps": 1})
    if load_model(made / "student", device="cpu").config.model_type == "t5":  # no longest input
        distill(run)
        return
    with pytest.raises(ConfigError, match="more than the 256"):
        distill(run)


def test_the_layout_is_read_from_the_model() -> None:
    tokenizer = tiny_tokenizer()
    assert layout_of(tiny_seq2seq("t5"), tokenizer) == Layout(0, (0,))
    model = tiny_seq2seq("bart")
    model.generation_config.forced_bos_token_id = 7
    assert layout_of(model, tokenizer) == Layout(0, (1, 7))
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        layout_of(model, tokenizer)


def test_a_model_from_a_configuration_starts_with_the_padding(tmp_path: Path) -> None:
    save(None, tiny_tokenizer(), tmp_path)
    config = {"model_type": "bart", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 300}
    config |= {"pad_token_id": 0, "eos_token_id": 1}
    assert layout_of(load_model(None, config=config, device="cpu"), tiny_tokenizer()) == Layout(0, (0,))
    forced = load_model(None, config=config | {"forced_bos_token_id": 5}, device="cpu")
    assert layout_of(forced, tiny_tokenizer()) == Layout(0, (0, 5))
