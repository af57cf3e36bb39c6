"""What a training step costs: supervised fine-tuning beside distillation, with and without the teacher's states kept.

    python benchmarks/step.py runs/smollm2/model.gguf --data ../shared/data/dolly/train.jsonl
    python benchmarks/step.py MODEL --data ROWS.jsonl --device cuda --mixed-precision bf16 --batch-size 32

All contenders train a student of the same layers of the same teacher on the same batches. They take turns, a step each,
after one epoch that warms up and fills the cache. Times are medians of CPU seconds on a CPU, of events on a GPU, and
ratios to supervised fine-tuning. Every contender but that has the loss of DistiLLM, and so the same loss.
"""

import argparse
import gc
import math
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from distillm import build
from distillm.config import Run, make_run
from distillm.kernels import linear_divergence
from distillm.project import training
from distillm.train import Step
from measure import begin, parser, seconds, write

CONTENDERS: dict[str, tuple[list[str], str]] = {
    "sft": (["method.name=sft"], "auto"),
    "sft, packed": (["method.name=sft", "train.packing=true"], "auto"),
    "sft, compiled": (["method.name=sft", "train.compile=true"], "auto"),
    "distillm, states kept": (["method.name=distillm", "teacher.cache=memory"], "auto"),
    "distillm, no cache": (["method.name=distillm", "teacher.cache=off"], "auto"),
    "distillm, no cache, full logits": (["method.name=distillm", "teacher.cache=off"], "eager"),
}
"""Settings, and the implementation of the divergence."""


class Contender:
    def __init__(self, run: Run, impl: str) -> None:
        self.project = build(run)
        self.steps = training(self.project)
        self.impl = impl
        self.times: list[float] = []
        self.losses: list[float] = []
        self.step: Step | None = None

    def __call__(self) -> None:
        with patch("distillm.losses.linear_divergence", partial(linear_divergence, impl=self.impl)):
            self.step = next(self.steps)


def settings(options: argparse.Namespace, output: str) -> dict[str, Any]:
    warmup = math.ceil(options.rows / options.batch_size)
    return {
        "teacher": {"path": options.teacher, "dtype": options.teacher_dtype},
        "student": {"layers": options.layers},
        "data": {"train": options.data, "validation": options.data, "validation_size": 1, "limit": options.rows,
                 "task": "instruction", "max_prompt": 256, "max_length": 512},
        "train": {"steps": warmup + options.repetitions, "batch_size": options.batch_size,
                  "micro_batch_size": options.batch_size, "mixed_precision": options.mixed_precision},
        "optim": {"lr": 1e-4},
        "device": options.device,
        "output": output,
        "overwrite": True,
    }  # fmt: skip


def contenders(options: argparse.Namespace, folder: str) -> Iterator[tuple[str, Contender]]:
    chosen = {name: how for name, how in CONTENDERS.items() if options.compile or "compile" not in name}
    for number, (name, (overrides, impl)) in enumerate(chosen.items()):
        given = settings(options, f"{folder}/{number}")
        if name.startswith("sft"):
            given["method"] = {"name": "sft"}
        yield name, Contender(make_run(given, overrides), impl)


def measure(options: argparse.Namespace, console: Console) -> dict[str, Contender]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        status = stack.enter_context(console.status("models"))
        found = dict(contenders(options, folder))
        warmup = math.ceil(options.rows / options.batch_size)
        for turn in range(warmup + options.repetitions):
            status.update(f"step {turn + 1} of {warmup + options.repetitions}")
            gc.collect()
            order = list(found.values())
            for contender in order[turn % len(order) :] + order[: turn % len(order)]:  # new shapes cost the first one
                took = seconds(contender, options.device)
                assert contender.step is not None
                if turn >= warmup:
                    contender.times.append(took)
                    contender.losses.append(contender.step.loss)
    return found


def show(found: dict[str, Contender], device: str, console: Console) -> list[dict[str, Any]]:
    clock = "CPU seconds" if device == "cpu" else "seconds"
    table = Table(title="a training step")
    for column in ("", "ratio", clock, "least", "most", "tokens/s", "loss"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    floor, results = statistics.median(found["sft"].times), []
    for name, contender in found.items():
        median = statistics.median(contender.times)
        assert contender.step is not None
        result = {"name": name, "ratio": median / floor, "seconds": median, "times": contender.times}
        result |= {"loss": statistics.mean(contender.losses), "tokens": contender.step.tokens}
        results.append(result)
        shown = (f"{x:.4g}" for x in (median, min(contender.times), max(contender.times)))
        rate = f"{contender.step.tokens / contender.times[-1]:,.0f}"
        table.add_row(name, f"{result['ratio']:.2f}", *shown, rate, f"{result['loss']:.5f}")
    console.print(table)
    return results


def parse() -> argparse.Namespace:
    asked = parser(__doc__)
    asked.add_argument("teacher", help="a model folder or GGUF file")
    asked.add_argument("--data", required=True, help="JSON Lines of instruction, input and output")
    asked.add_argument("--layers", type=int, default=8, help="of the teacher that the student has")
    asked.add_argument("--rows", type=int, default=64)
    asked.add_argument("--batch-size", type=int, default=8)
    asked.add_argument("--repetitions", type=int, default=8)
    asked.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    asked.add_argument("--mixed-precision", choices=["none", "bf16"], default="none")
    asked.add_argument("--teacher-dtype", default="float32")
    asked.add_argument("--compile", action="store_true", help="compiled fine-tuning too, which takes minutes at first")
    return asked.parse_args()


def main() -> None:
    options = parse()
    console, described = begin(options, options.device)
    results = show(measure(options, console), options.device, console)
    write(options, described, results=results)


if __name__ == "__main__":
    main()
