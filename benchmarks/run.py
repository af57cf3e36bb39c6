"""What a whole run costs: ours by every method, TRL's trainers, and the paper's loop written plainly.

    python benchmarks/run.py MODEL.gguf --data train.jsonl --validation valid.jsonl --output results.json

All train a student of the same layers of the same teacher on the same rows, with the same number of steps, each in a
process of its own. CPU seconds are those of the training steps: what is loaded, tokenised and validated before and
after is left out, what generates and what fills a cache is not. Where a method has a
probability of using the student's responses, it rises from 0 to 1 in equal steps. The last columns say how near the
student came to the teacher on rows that nobody trained on.

"the paper's loop" is algorithm 1 of arXiv:2402.03898 as its authors' code runs it: every batch padded to max_length,
responses generated eight at a time, all logits formed, the teacher run on every row at every step.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

from distillm import build, measure
from distillm.accounting import account_for, kept_by, taken
from distillm.config import make_run
from distillm.project import Project, training
from distillm.types import Example
from measure import contenders, in_turn, parser

OURS: dict[str, dict[str, Any]] = {
    "sft": {"method": {"name": "sft"}},
    "kd, no cache": {"method": {"name": "kd"}, "cache": "off"},
    "kd": {"method": {"name": "kd"}},
    "gkd, on-policy": {"method": {"name": "gkd", "sampling": "on_policy", "beta": 0.5}},
    "distillm": {"method": {"name": "distillm"}},
    "distillm, no cache": {"method": {"name": "distillm"}, "cache": "off"},
    "distillm, staleness 20": {"method": {"name": "distillm", "max_staleness": 20}},
}


def project_of(options: argparse.Namespace, name: str, folder: str) -> Project:
    given = OURS.get(name, {"method": {"name": "kd"}, "cache": "off"})
    steps = options.rows // options.batch_size * options.epochs
    return build(make_run({
        "teacher": {"path": options.teacher, "cache": given.get("cache", "memory")},
        "student": {"layers": options.layers},
        "data": {"train": options.data, "validation": options.validation, "validation_size": options.validation_rows,
                 "limit": options.rows, "template": "chat", "max_prompt": options.max_length - options.max_new_tokens,
                 "max_length": options.max_length},
        "method": given["method"],
        "generation": {"max_new_tokens": options.max_new_tokens, "batch_size": 128},
        "train": {"steps": steps, "batch_size": options.batch_size, "micro_batch_size": options.batch_size},
        "optim": {"lr": options.lr, "warmup_steps": max(steps // 20, 1)},
        "device": "cpu", "output": folder, "overwrite": True,
    }))  # fmt: skip


def ours(project: Project, options: argparse.Namespace) -> int:
    state, done = project.state, 0
    state.validation.append(0.0)
    for step in training(project):
        done += 1
        if step.step * 11 // state.total_steps > len(state.validation) - 1:
            state.validation.append(state.validation[-1] + 1.0)  # "worse": the probability rises by a tenth
    return done


def trl_gkd(project: Project, options: argparse.Namespace) -> int:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    asked, told = spoken(options)
    messages = [[*prompt, {"role": "assistant", "content": answer}] for prompt, answer in zip(asked, told, strict=True)]
    config = GKDConfig(
        **trainers(project, options), lmbda=1.0, max_new_tokens=options.max_new_tokens, max_length=options.max_length
    )
    return trained(GKDTrainer, config, {"messages": messages}, project)


def trl_distillation(project: Project, options: argparse.Namespace) -> int:
    from trl import DistillationConfig, DistillationTrainer

    config = DistillationConfig(**trainers(project, options), max_completion_length=options.max_new_tokens)
    return trained(DistillationTrainer, config, {"prompt": spoken(options)[0]}, project)


def spoken(options: argparse.Namespace) -> tuple[list[list[dict[str, str]]], list[str]]:
    """What the user says in each row, as TRL's trainers read it, and the answers."""
    lines = Path(options.data).read_text(encoding="utf-8").splitlines()[: options.rows]
    rows = [json.loads(line) for line in lines]
    asked = ["\n".join(filter(None, (row["instruction"], row.get("input", "")))) for row in rows]
    return [[{"role": "user", "content": text}] for text in asked], [row["output"] for row in rows]


def trainers(project: Project, options: argparse.Namespace) -> dict[str, Any]:
    """What both of TRL's trainers are told: the same models, rows, batch, steps and divergence as ours."""
    steps = project.state.total_steps
    return {
        "output_dir": str(project.folder.path / "trl"), "max_steps": steps, "beta": 0.5, "temperature": 1.0,
        "per_device_train_batch_size": options.batch_size, "learning_rate": options.lr, "lr_scheduler_type": "cosine",
        "warmup_steps": max(steps // 20, 1), "gradient_checkpointing": False, "use_cpu": True, "bf16": False,
        "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def trained(
    trainer_class: Any, config: Any, columns: dict[str, Any], project: Project, callbacks: Sequence[Any] = ()
) -> int:
    from datasets import Dataset

    models = project.models
    trainer = trainer_class(
        model=models.student, teacher_model=models.teacher, args=config, processing_class=models.tokenizer,
        train_dataset=Dataset.from_dict(columns), callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train()
    return trainer.state.global_step


def papers_loop(project: Project, options: argparse.Namespace) -> int:
    models, total, length = project.models, project.state.total_steps, options.max_length
    student, teacher, pad = models.student, models.teacher, models.pair.layout.pad_id
    assert teacher is not None
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.lr)
    scheduler = get_cosine_schedule_with_warmup(optimizer, max(total // 20, 1), total)
    chance, buffer = random.Random(0), list[Example]()

    def respond(rows: list[Example]) -> list[Example]:
        width, written = max(len(row.prompt) for row in rows), list[Example]()
        for at in range(0, len(rows), 8):
            part = rows[at : at + 8]
            ids = torch.tensor([[pad] * (width - len(row.prompt)) + row.prompt for row in part])
            mask = torch.tensor([[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in part])
            student.eval()
            out: Any = student.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=options.max_new_tokens,
                eos_token_id=list(models.end_ids), pad_token_id=pad,
            )  # fmt: skip
            student.train()
            for row, answer in zip(part, out[:, width:].tolist(), strict=True):
                ends = [place for place, token in enumerate(answer) if token in models.end_ids]
                answer = answer[: ends[0] + 1] if ends else answer
                targets = [False] * len(row.prompt) + [True] * len(answer)
                written.append(Example(row.id, row.prompt + answer, targets))
        return written

    def step(rows: list[Example]) -> None:
        ids, labels = torch.full((len(rows), length), pad), torch.full((len(rows), length), -100)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for place, row in enumerate(rows):
            size = min(len(row.tokens), length)
            ids[place, :size], mask[place, :size] = torch.tensor(row.tokens[:size]), 1
            target = torch.tensor(row.targets[1:size])
            labels[place, : size - 1] = torch.where(target, ids[place, 1:size], -100)
        with torch.no_grad():
            p = teacher(input_ids=ids, attention_mask=mask).logits.float().softmax(-1)
        logits = student(input_ids=ids, attention_mask=mask).logits.float()
        q, kept = logits.softmax(-1), (labels != -100).float()
        cross = (p * (0.1 * p + 0.9 * q).log()).sum(-1)
        lm = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss = -(cross * kept).sum() / kept.sum() + 0.0 * lm
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    student.train()
    for number in range(total):
        rows = chance.sample(project.train.examples, options.batch_size)
        probability, ratio = number * 11 // total / 10, 1 - number / total
        if chance.random() < probability * ratio:
            buffer = (buffer + respond(rows))[-1000:]
        if buffer and chance.random() < probability:
            rows = chance.sample(buffer, min(len(buffer), options.batch_size))
        step(rows)
    return total


OTHERS: dict[str, Callable[[Project, argparse.Namespace], int]] = {
    "TRL GKDTrainer, on-policy": trl_gkd,
    "TRL DistillationTrainer": trl_distillation,
    "the paper's loop": papers_loop,
}


def one(options: argparse.Namespace) -> dict[str, Any]:
    """One contender, in this process."""
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder, kept_by(account_for("cpu")):
        project = project_of(options, options.one, folder)
        taken()
        began = time.process_time()
        done = OTHERS.get(options.one, ours)(project, options)
        took = time.process_time() - began
        parts, _ = taken()
        project.models.student.eval()
        after = measure(project.run, project.models, project.validation.examples)
    return {"seconds": took, "steps": done, "parts": parts, "validation": after}


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    table, floor = Table(title="whole runs"), results.get("sft", {}).get("seconds")
    for column in ("", "ratio", "CPU seconds", "s a step", "divergence", "cross-entropy", "most of it"):
        table.add_column(column, justify="left" if column in ("", "most of it") else "right", no_wrap=True)
    for name, result in results.items():
        if "why" in result:
            table.add_row(name, "failed")
            continue
        longest = sorted(result["parts"].items(), key=lambda item: -item[1])[:2]
        total = sum(result["parts"].values())
        table.add_row(
            name,
            f"{result['seconds'] / floor:.2f}" if floor else "-",
            f"{result['seconds']:.0f}",
            f"{result['seconds'] / result['steps']:.2f}",
            f"{result['validation']['divergence']:.3f}" if "divergence" in result["validation"] else "-",
            f"{result['validation']['cross_entropy']:.3f}",
            ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in longest) if name in OURS else "",
        )
    console.print(table)


def parse() -> argparse.Namespace:
    asked = parser(__doc__)
    contenders(asked, [*OURS, *OTHERS])
    asked.add_argument("--validation", required=True, help="rows of the same kind that nobody trains on")
    asked.add_argument("--layers", type=int, default=8, help="of the teacher that the student has")
    asked.add_argument("--rows", type=int, default=512)
    asked.add_argument("--validation-rows", type=int, default=32)
    asked.add_argument("--epochs", type=int, default=10)
    asked.add_argument("--batch-size", type=int, default=8)
    asked.add_argument("--max-length", type=int, default=512)
    asked.add_argument("--max-new-tokens", type=int, default=128)
    asked.add_argument("--lr", type=float, default=3e-4)
    return asked.parse_args()


if __name__ == "__main__":
    in_turn(parse(), "cpu", one, show)
