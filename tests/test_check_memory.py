"""The memory that ``distillm check`` foresees is what the run then holds: three kinds of runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny import save, tiny_model, tiny_tokenizer
from tiny_run import rows, settings, write_rows

MEASURE = """
import json, os, sys
import distillm.checking, distillm.pipeline

def foreseen(run):
    cost = distillm.checking.check(run).cost
    assert cost.work, "no step was tried"
    return cost.memory

def held(run):
    log = distillm.pipeline.distill(run) / "metrics.jsonl"
    times = [json.loads(line) for line in log.read_text().splitlines()]
    return max(entry["peak_bytes"] for entry in times if entry["kind"] == "time")

for path in sys.argv[1:]:
    for work in (foreseen, held):  # each in a process of its own, which begins with what is imported here
        child = os.fork()
        if child == 0:
            print("measured", path, work(distillm.config.load_run(path)), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
"""


def weights_and_their_averages(folder: Path) -> dict[str, Any]:
    """Knowledge distillation of 38 M parameters: weights, gradients and AdamW's averages are most of it."""
    size = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_key_value_heads": 12}
    save(tiny_model("llama", layers=4, **size), tiny_tokenizer(), folder / "student")
    save(tiny_model("llama", layers=5, **size), tiny_tokenizer(), folder / "teacher")
    write_rows(folder / "train.jsonl", rows(10))
    return {"method": {"name": "kd"}, "train": {"steps": 2, "batch_size": 2}, "generation.max_new_tokens": 8}


def activations(folder: Path) -> dict[str, Any]:
    """Fine-tuning on long rows, many at a time: what is kept for the backward pass is most of it."""
    model = tiny_model("gpt2", layers=8, n_embd=256, n_head=8)
    save(model, tiny_tokenizer(), folder / "student")
    long = [{"instruction": "Say it.", "output": "one two three four five six seven eight nine ten " * 12}] * 20
    write_rows(folder / "train.jsonl", long)
    return {
        "method": {"name": "sft"}, "teacher": None, "train": {"steps": 1, "batch_size": 14, "micro_batch_size": 14},
        "data.max_length": 240, "generation.max_new_tokens": 8,
    }  # fmt: skip


def what_the_student_writes(folder: Path) -> dict[str, Any]:
    """An encoder-decoder that learns from its own responses, longer than those of the data."""
    size = {"d_model": 512, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    for name, layers in (("student", 3), ("teacher", 4)):
        save(tiny_model("bart", layers=layers, **size, **heads), tiny_tokenizer(), folder / name)
    write_rows(folder / "train.jsonl", rows(10))
    return {
        "method": {"name": "distillm", "initial_probability": 1.0, "capacity": 32},
        "train": {"steps": 2, "batch_size": 16, "micro_batch_size": 16}, "generation.max_new_tokens": 96,
        "validation": {"samples": 1, "every": 2},
    }  # fmt: skip


CASES = (weights_and_their_averages, activations, what_the_student_writes)


@pytest.fixture(name="measured", scope="module")
def _measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Bytes by case: what is foreseen, and what is held then."""
    paths: dict[str, str] = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp(case.__name__)
        changes = case(folder)
        write_rows(folder / "valid.jsonl", rows(2, 20))
        write_rows(folder / "test.jsonl", rows(2, 40))
        common = {"data.text": None, "validation": {"samples": 1}, "evaluation.seeds": [1], "checkpoint": {}}
        (folder / "run.yaml").write_text(json.dumps(settings(folder, folder / "run", common | changes)), "utf-8")
        paths[str(folder / "run.yaml")] = case.__name__
    done = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[int]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("measured"):
            _, path, count = line.split()
            found.setdefault(paths[path], []).append(int(count))
    return found


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_memory_is_foreseen_within_a_fifth(case: str, measured: dict[str, list[int]]) -> None:
    foreseen, held = measured[case]
    empty = 400 * 2**20  # about what Python with torch and transformers takes
    assert held > 2 * empty, "the run is too small to say anything"
    assert abs(foreseen - held) <= 0.2 * held, f"foreseen {foreseen / 2**20:.0f} MiB, held {held / 2**20:.0f} MiB"
