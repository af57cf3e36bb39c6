"""A folder in which the commands of the documentation run: tiny models and rows under the names that the pages use.

A hub name such as HuggingFaceTB/SmolLM2-135M-Instruct means a folder of that path where there is one.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from command_line import done
from docs_pages import ROOT, fences
from tiny import CHAT_TEMPLATE, save, tiny_model, tiny_tokenizer
from tiny_gguf import write_gguf
from tiny_run import NUMBERS, write_rows

BIG, SMALL = "HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"
SHORT = {
    "train.epochs": None,
    "train.steps": 2,
    "train.batch_size": 2,
    "train.micro_batch_size": 2,
    "optim.warmup_steps": 0,
    "data.text_length": 16,
    "data.limit": 6,
    "data.validation_size": 2,
    "validation.every": 2,
    "validation.rouge_rows": 2,
    "generation.max_new_tokens": 3,
    "evaluation.seeds": [1],
    "evaluation.limit": 2,
    "device": "cpu",
}
"""What is appended to a run, so that it ends within a second."""

RUN: dict[str, Any] = {
    "teacher": {"path": BIG},
    "student": {"path": SMALL},
    "data": {"train": "my/train.jsonl", "test": {"mine": "my/test.jsonl"}, "template": "chat"},
    "method": {"name": "distillm"},
    "train": {"epochs": 3, "batch_size": 32},
    "output": "runs/mine",
}
"""The run.yaml of a page that shows none."""


def overrides() -> list[str]:
    """``SHORT`` as arguments."""
    return [f"{name}={json.dumps(value)}" for name, value in SHORT.items()]


def make_workspace(folder: Path) -> Path:
    """Models, rows, a GGUF file, and two finished runs."""
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    for name, layers in ((BIG, 12), (SMALL, 2), ("deep", 30), ("model", 1)):
        model = tiny_model("llama", layers=layers, seed=layers, max_position_embeddings=1024)
        save(model, tokenizer, folder / name)
    for name in ("gpt2", "gpt2-xl"):
        save(tiny_model("gpt2", layers=1, seed=4, n_positions=1024), tokenizer, folder / "openai-community" / name)
    for name in ("t5-3b", "t5-small"):
        save(tiny_model("t5", layers=1, seed=5), tokenizer, folder / "google-t5" / name)
    save(tiny_model("t5", layers=6, seed=6), tokenizer, folder / "encoder-decoder")
    save(tiny_model("marian", layers=6, seed=7), tokenizer, folder / "Helsinki-NLP" / "opus-mt-en-fr")
    shutil.copytree(ROOT / "studies" / "tutorials", folder / "studies" / "tutorials")
    model = tiny_model("llama", layers=1, vocab_size=308, max_position_embeddings=1024)  # a token more when it is read
    write_gguf(model, tokenizer, folder / "model.gguf")
    shutil.copy(folder / "model.gguf", folder / "mine.gguf")
    _write_rows(folder)
    return folder


def _write_rows(folder: Path) -> None:
    said = [(f"Say {a} {b}.", f"{a} and {b}") for a in NUMBERS[:5] for b in NUMBERS[:3]]
    names = ("instruction", "output"), ("question", "answer"), ("source", "target")
    both = [dict(zip(sum(names, ()), pair * 3, strict=True)) for pair in said]
    kinds: dict[str, list[dict[str, Any]]] = {
        "train": both[:9],
        "valid": both[9:11],
        "test": both[11:],
        "prompts": [{"instruction": q} for q, _ in said],
        "articles": [{"body": q * 3, "title": a} for q, a in said],
        "chats": [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in said],
    }
    for place in ("my", "other", "data/dolly", "prompts"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    kinds |= {f"more-{name}": kinds[name][:2] for name in ("articles", "chats")}
    for name, rows in kinds.items():
        write_rows(folder / "my" / f"{name}.jsonl", rows)
    write_rows(folder / "other" / "more.jsonl", both[:2])
    for name in ("train", "valid", "test"):
        write_rows(folder / "data" / "dolly" / f"{name}.jsonl", kinds[name])
    for name in ("self_instruct", "vicuna", "super_natural_instructions"):
        (folder / "data" / name).mkdir()
        write_rows(folder / "data" / name / "test.jsonl", both[:2])
    for name, fields in {"samsum": ("document", "summary"), "data/multi30k": ("source", "target")}.items():
        (folder / name).mkdir()
        for split in ("train", "valid", "test"):
            write_rows(folder / name / f"{split}.jsonl", [dict(zip(fields, pair, strict=True)) for pair in said])
    write_rows(folder / "data" / "openwebtext.jsonl", [{"text": "A river runs through the valley. " * 9}] * 4)
    write_rows(folder / "answers.jsonl", [{"prediction": q, "references": [a]} for q, a in said])


def make_runs(folder: Path) -> None:
    """The finished runs ``mine`` and ``kd`` under ``made``, with scores on ``dolly``."""
    for name, method in (("mine", "distillm"), ("kd", "kd")):
        settings = RUN | {"method": {"name": method}, "output": f"made/{name}", "student": {"path": "model"}}
        settings["data"] = RUN["data"] | {"test": {"dolly": "my/test.jsonl"}}
        (folder / "made.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        done("train", "made.yaml", *overrides())


def prepare(page: str, workspace: Path, folder: Path, runs: list[str], changes: dict[str, Any]) -> None:
    """``folder`` as a reader of ``page`` has it: the workspace, the page's own files, ``runs`` finished."""
    shutil.copytree(workspace, folder, dirs_exist_ok=True)
    if "/tutorials/" in page:  # which name layers of a model of 30
        shutil.copytree(folder / "deep", folder / SMALL, dirs_exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN | changes), encoding="utf-8")
    shown = fences(page)
    titled = [fence for fence in shown if fence.title is not None]
    if page == "README.md":  # which shows one YAML, and names it in the text
        (folder / "run.yaml").write_text(next(f.text for f in shown if f.language == "yaml"), encoding="utf-8")
    for fence in titled:
        (folder / str(fence.title)).parent.mkdir(parents=True, exist_ok=True)
        (folder / str(fence.title)).write_text(fence.text, encoding="utf-8")
    for run in runs:
        shutil.copytree(folder / "made" / ("kd" if run.endswith(("kd", "/b")) else "mine"), folder / run)
        if "/grid/" in run:  # what a sweep leaves beside its runs
            for name in ("table.md", "report.html"):
                (folder / run).with_name(name).touch()
