"""The peak memory and the speed of on-policy distillation: ours plain, sharded, compiled, checkpointed; TRL's trainer.

    python benchmarks/memory.py MODEL --data train.jsonl --device cuda --output results.json

All train a student of the same layers of the same teacher in bfloat16, on the student's own responses, with the
generalized JSD of 0.5; each in a process of its own, as peaks want it. Sharded ones are started by torchrun with one
process, which spreads nothing but takes the same way as many. Tokens are those that the student reads to learn from,
prompts too, counted as it reads them; the seconds of a step hold its generation, the teacher and the optimizer. The
first steps are left out.
"""

import argparse
import tempfile
import time
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback
from transformers.utils import logging

from distillm import build
from distillm.config import make_run
from distillm.project import Project, training
from measure import contenders, in_turn, parser, resident
from run import spoken, trained

OURS: dict[str, dict[str, bool]] = {
    "ours": {},
    "ours, checkpointed": {"gradient_checkpointing": True},
    "ours, sharded": {"shard": True},
    "ours, sharded, checkpointed": {"shard": True, "gradient_checkpointing": True},
    "ours, sharded, compiled": {"shard": True, "compile": True},
    "ours, sharded, compiled, checkpointed": {"shard": True, "compile": True, "gradient_checkpointing": True},
}
TRL = {"TRL DistillationTrainer": False, "TRL DistillationTrainer, checkpointed": True}
"""Whether gradients are checkpointed."""


def project_of(options: argparse.Namespace, folder: str) -> Project:
    return build(make_run({
        "teacher": {"path": options.teacher, "cache": "off"},
        "student": {"layers": options.layers},
        "data": {"train": options.data, "limit": options.batch_size * options.steps, "template": "chat",
                 "max_prompt": options.max_prompt, "max_length": options.max_prompt + options.max_new_tokens},
        "method": {"name": "gkd", "sampling": "on_policy", "beta": 0.5},
        "generation": {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size},
        "train": {"steps": options.steps, "batch_size": options.batch_size, "micro_batch_size": options.batch_size,
                  "mixed_precision": "bf16", **OURS.get(options.one, {})},
        "optim": {"lr": options.lr, "warmup_steps": 1},
        "device": options.device, "output": folder, "overwrite": True,
    }))  # fmt: skip


class Clock(TrainerCallback):
    """When each step ended, the tokens read until then, and the most memory since the first steps."""

    def __init__(self, project: Project, options: argparse.Namespace) -> None:
        self.cuda, self.skipped, self.tokens = options.device == "cuda", options.skipped, 0
        self.ended, self.read = list[float](), list[int]()
        project.models.student.base_model.register_forward_pre_hook(self.reads, with_kwargs=True)

    def reads(self, model: Any, args: Any, given: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            mask, ids = given.get("attention_mask"), args[0] if args else given["input_ids"]
            self.tokens += ids.numel() if mask is None else int(mask.sum())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.ended.append(time.perf_counter())
        self.read.append(self.tokens)
        if self.cuda and len(self.ended) == self.skipped:
            torch.cuda.reset_peak_memory_stats()

    def told(self) -> dict[str, Any]:
        first = self.skipped - 1
        seconds, tokens = self.ended[-1] - self.ended[first], self.read[-1] - self.read[first]
        peak = torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")
        return {"seconds": seconds / (len(self.ended) - self.skipped), "tokens": tokens / seconds, "peak": peak}


def one(options: argparse.Namespace) -> dict[str, Any]:
    """One contender, in this process."""
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        project = project_of(options, folder)
        clock = Clock(project, options)
        if options.one in OURS:
            for _ in islice(training(project), options.steps):
                clock.on_step_end()
        else:
            from trl import DistillationConfig, DistillationTrainer

            config = DistillationConfig(
                output_dir=folder, max_steps=options.steps, beta=0.5, temperature=1.0, learning_rate=options.lr,
                per_device_train_batch_size=options.batch_size, max_completion_length=options.max_new_tokens,
                gradient_checkpointing=TRL[options.one], use_cpu=not clock.cuda, bf16=True, report_to="none",
                save_strategy="no", logging_strategy="no", disable_tqdm=True, warmup_steps=1,
            )  # fmt: skip
            options.rows = options.batch_size * options.steps
            trained(DistillationTrainer, config, {"prompt": spoken(options)[0]}, project, [clock])
        return clock.told()


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table(title="on-policy distillation in bfloat16")
    for column in ("", "peak MiB", "tokens/s", "s a step"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, result in results.items():
        if "why" in result:
            table.add_row(name, "failed")
        else:
            table.add_row(name, f"{result['peak'] / 2**20:.0f}", f"{result['tokens']:.0f}", f"{result['seconds']:.2f}")
    console.print(table)


def parse() -> argparse.Namespace:
    asked = parser(__doc__)
    contenders(asked, [*OURS, *TRL])
    asked.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    asked.add_argument("--layers", type=int, default=10, help="of the teacher that the student has")
    asked.add_argument("--batch-size", type=int, default=32)
    asked.add_argument("--steps", type=int, default=8)
    asked.add_argument("--skipped", type=int, default=3, help="first steps that are not timed")
    asked.add_argument("--max-prompt", type=int, default=256)
    asked.add_argument("--max-new-tokens", type=int, default=128)
    asked.add_argument("--lr", type=float, default=3e-4)
    return asked.parse_args()


def launched(name: str) -> list[str]:
    spread = OURS.get(name, {}).get("shard", False)
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"] if spread else []


if __name__ == "__main__":
    asked = parse()
    in_turn(asked, asked.device, one, show, launched, lines=12)
