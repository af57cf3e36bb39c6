"""How cost grows: with vocabulary, rows, length, the size of the models, and the number of processes.

    python benchmarks/scaling.py                            # on a CPU
    python benchmarks/scaling.py --only "response rows" --device cuda --dtype bfloat16

One thing is varied at a time (by length, the tokens stay: rows are fewer where they are longer), from models of random
weights on rows of random tokens, half of each a prompt. A step is KD's, on a teacher twice as deep as the student,
beside fine-tuning's of the same student on the same rows. Times are medians, CPU seconds on a CPU and events on a GPU;
memory is the most that a step, or head and loss alone ("response rows"), held beside what was there before. Processes
train at once, each with a share of the threads and a model of its own, and rates are sums by the clock on the wall:
how far the machine carries several runs (`distillm sweep --jobs`).
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from distillm import Context, Example, Layout, LocalTeacher, Method, Pair, State, head_of, kd, sft, training_steps
from distillm.sources import Draw, ReplayBuffer
from linear_divergence import Case, make_data, ours, run
from measure import DTYPES, begin, parser, peak_memory, seconds, write


@dataclass(frozen=True)
class Work:
    """A step: so many rows of so many tokens, and the student's shape; the teacher is twice as deep."""

    vocabulary: int = 32_000
    rows: int = 8
    length: int = 128
    layers: int = 4
    width: int = 256

    @property
    def tokens(self) -> int:
        return self.rows * self.length


BASE = Work()
SWEEPS: dict[str, list[tuple[str, Work]]] = {
    "vocabulary": [(f"{v:,}", replace(BASE, vocabulary=v)) for v in (16_000, 32_000, 64_000, 128_000)],
    "rows": [(str(n), replace(BASE, rows=n)) for n in (4, 8, 16, 32)],
    "length": [(str(n), replace(BASE, length=n, rows=1024 // n)) for n in (64, 128, 256, 512, 1024)],
    "model": [(f"{n} x {w}", replace(BASE, layers=n, width=w)) for n, w in ((2, 128), (4, 256), (8, 512))],
}
RESPONSE_ROWS = [1024, 2048, 4096, 8192, 16_384]


class Steps:
    """The steps of one method on one piece of work, the same rows each time."""

    def __init__(self, work: Work, method: Callable[[Context], Method], device: str, dtype: str) -> None:
        self.work, how = work, torch.Generator().manual_seed(0)
        start = work.length // 2
        ids = torch.randint(2, work.vocabulary, (work.rows, work.length), generator=how).tolist()
        targets = [False] * start + [True] * (work.length - start)
        rows = [Example(str(number), row, targets) for number, row in enumerate(ids)]

        def model(layers: int) -> Any:
            config = LlamaConfig(
                vocab_size=work.vocabulary, hidden_size=work.width, intermediate_size=4 * work.width,
                num_hidden_layers=layers, num_attention_heads=work.width // 64, max_position_embeddings=work.length,
            )  # fmt: skip
            return AutoModelForCausalLM.from_config(config).to(device, DTYPES[dtype])

        torch.manual_seed(0)
        student, teacher = model(work.layers), model(2 * work.layers).eval().requires_grad_(False)
        layout, place = Layout(0), torch.device(device)
        said = LocalTeacher(teacher, head_of(teacher), layout, place)
        pair = Pair(student, head_of(student), said, work.vocabulary, layout, place)
        context = Context(lambda _: Draw(rows), 1, self.nobody, ReplayBuffer(1), seed=0, end_ids=[1])
        self.steps = training_steps(
            pair,
            method(context),
            torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True),
            State(total_steps=10**6),
            accelerator=Accelerator(cpu=device == "cpu"),
            learning_rate=lambda _: 1e-4,
            micro_batch_size=work.rows,
        )

    @staticmethod
    def nobody(*_: Any, **__: Any) -> list[Example]:
        raise AssertionError("these methods do not generate")

    def __call__(self) -> None:
        next(self.steps)


def figures(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"tokens": work.tokens}
    methods: dict[str, Callable[[Context], Method]] = {"sft": sft, "kd": partial(kd, divergence="forward_kl")}
    for name, method in methods.items():
        step = Steps(work, method, options.device, options.dtype)
        step()
        found[f"{name}_bytes"] = peak_memory(step, options.device)
        found[name] = statistics.median(seconds(step, options.device) for _ in range(options.repetitions))
    return found


def heads(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Head and loss alone, where the rows of a step grow and everything else stays."""
    for rows in RESPONSE_ROWS:
        data = make_data(Case(50_257, 256, 512, rows, rows, options.dtype, options.device))
        call = partial(run, partial(ours, "auto", "jsd", {"beta": 0.5}), data)
        call()
        memory = peak_memory(call, options.device)
        took = statistics.median(seconds(call, options.device) for _ in range(max(1, options.repetitions // 2)))
        yield f"{rows:,}", {"tokens": rows, "head": took, "head_bytes": memory}


def trained(threads: int, barrier: Any, options: argparse.Namespace) -> float:
    """Tokens a second of one process of several."""
    torch.set_num_threads(threads)
    step = Steps(BASE, partial(kd, divergence="forward_kl"), options.device, options.dtype)
    step()
    barrier.wait()
    began = time.perf_counter()
    for done in count(1):
        step()
        took = time.perf_counter() - began
        if took > options.seconds:
            return done * BASE.tokens / took
    raise AssertionError


def processes(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    spawn, cores = multiprocessing.get_context("spawn"), torch.multiprocessing.cpu_count()
    for number in (n for n in (1, 2, 4, 8) if n <= cores):
        with spawn.Manager() as manager, ProcessPoolExecutor(number, mp_context=spawn) as pool:
            barrier = manager.Barrier(number, timeout=600)
            rates = list(pool.map(trained, [cores // number] * number, [barrier] * number, [options] * number))
        yield str(number), {"threads": cores // number, "rates": rates, "tokens_per_second": sum(rates)}


def show(title: str, rows: list[tuple[str, dict[str, Any]]], console: Console) -> None:
    table, first = Table(title=f"by {title}"), rows[0][1]
    kinds = [name for name in ("sft", "kd", "head") if name in first]
    table.add_column(title, no_wrap=True)
    for kind in kinds:
        for column in (f"{kind}, s", "ms a token", "MiB"):
            table.add_column(column, justify="right", no_wrap=True)
    if "kd" in kinds:
        table.add_column("kd by sft", justify="right", no_wrap=True)
    if not kinds:
        for column in ("threads each", "tokens/s", "by one"):
            table.add_column(column, justify="right", no_wrap=True)
    for name, found in rows:
        cells: list[str] = []
        for kind in kinds:
            memory = found[f"{kind}_bytes"]
            cells += [f"{found[kind]:.3g}", f"{1e3 * found[kind] / found['tokens']:.3g}"]
            cells.append("-" if memory is None else f"{memory / 2**20:,.0f}")
        if "kd" in kinds:
            cells.append(f"{found['kd'] / found['sft']:.2f}")
        if not kinds:
            rate = found["tokens_per_second"]
            cells += [str(found["threads"]), f"{rate:,.0f}", f"{rate / first['tokens_per_second']:.2f}"]
        table.add_row(name, *cells)
    console.print(table)


def parse() -> argparse.Namespace:
    names = [*SWEEPS, "response rows", "processes"]
    asked = parser(__doc__)
    asked.add_argument("--only", nargs="+", default=names, choices=names)
    asked.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    asked.add_argument("--dtype", choices=list(DTYPES), default="float32")
    asked.add_argument("--repetitions", type=int, default=5)
    asked.add_argument("--seconds", type=float, default=20, help="that processes train at once")
    return asked.parse_args()


def main() -> None:
    options = parse()
    console, described = begin(options, options.device)
    logging.set_verbosity_error()
    others = {"response rows": heads, "processes": processes}
    tables: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for title in options.only:
        with console.status(f"by {title}") as status:
            made = others[title](options) if title in others else (
                (name, figures(work, options)) for name, work in SWEEPS[title]
            )  # fmt: skip
            tables[title] = []
            for name, found in made:
                tables[title].append((name, found))
                status.update(f"by {title}: {name}")
        show(title, tables[title], console)
        write(options, described, results=tables)


if __name__ == "__main__":
    main()
