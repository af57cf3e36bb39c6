"""What the head and the loss cost, forward and backward: ours beside other tools, on the same data in one process.

    python benchmarks/linear_divergence.py                          # on a CPU: 402 rows of 1024, GPT-2's vocabulary
    python benchmarks/linear_divergence.py --device cuda --output results.json

Every contender gets the hidden states and unembeddings of a teacher and a student and gives the gradients of the
student's. A tool that scores prompts and padding too gets all rows, as it would in training; the others get the
responses. Times are medians of repetitions that take turns, as ratios to plain cross-entropy on the responses: CPU
seconds on a CPU, events on a GPU. Memory is what is needed at most beside the inputs. The limit is what the products
that cannot be avoided would take at the speed of a large one here. The error is that of the gradients, as a share of
their norm, beside those of a float32 computation on the same numbers.

The other tools are optional. With the extra `bench`, in an environment of their own:

    pip install -c constraints.txt torch
    pip install -c constraints.txt -e '.[bench]'

If the two ask for other versions than those: pip install --no-deps trl liger-kernel.
"""

import argparse
import gc
import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from distillm.errors import ConfigError
from distillm.kernels import linear_cross_entropy, linear_divergence
from distillm.types import IGNORE, Head
from measure import DTYPES, begin, parser, peak_memory, peaks, seconds, write

BETA, ALPHA = 0.5, 0.1
# Of GPT-2, Llama 3 and Qwen 2.5; widths of a student and a teacher; rows of responses.
VOCABULARIES, WIDTHS, ROWS = [50_257, 128_256, 151_936], ["768:1600", "2048:4096"], [1024, 4096, 16_384]
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"dtype": "float32", "vocabulary": [50_257], "widths": ["256:512"], "rows": [402], "share": 402 / 1024},
    "cuda": {"dtype": "bfloat16", "vocabulary": VOCABULARIES, "widths": WIDTHS, "rows": ROWS, "share": 1.0},
}
LARGEST_WITH_ERRORS = 4096  # rows; float32 takes long for more
FLOOR = "cross-entropy, plain"
CANNOT = {ImportError: "not installed", ConfigError: "not here", torch.OutOfMemoryError: "out of memory"}


@dataclass(frozen=True)
class Case:
    vocabulary: int
    student_width: int
    teacher_width: int
    rows: int
    all_rows: int
    dtype: str
    device: str


@dataclass(frozen=True)
class Data:
    """Hidden states of all rows, unembeddings, labels with ``IGNORE`` where no response is."""

    teacher_hidden: Tensor
    teacher_weight: Tensor
    student_hidden: Tensor
    student_weight: Tensor
    labels: Tensor

    @property
    def responses(self) -> Tensor:
        return self.labels != IGNORE

    def heads(self) -> tuple[Head, Head]:
        """Of the responses alone."""
        teacher, student = self.teacher_hidden[self.responses], self.student_hidden[self.responses]
        return Head(teacher, self.teacher_weight), Head(student, self.student_weight)

    def mean_weights(self) -> Tensor:
        return torch.full((int(self.responses.sum()),), 1 / self.responses.sum().item(), device=self.labels.device)

    def all_logits(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher = F.linear(self.teacher_hidden, self.teacher_weight)
        return teacher, F.linear(self.student_hidden, self.student_weight)


Loss = Callable[..., Tensor]  # of data: the mean over the responses


def make_data(case: Case) -> Data:
    how: Any = {"generator": torch.Generator(case.device).manual_seed(0), "device": case.device}

    def model(width: int) -> list[Tensor]:
        hidden = torch.randn(case.all_rows, width, **how)
        weight = torch.randn(case.vocabulary, width, **how) * (2 * width**-0.5)
        return [x.to(DTYPES[case.dtype]) for x in (hidden, weight)]

    labels = torch.full((case.all_rows,), IGNORE, device=case.device)
    chosen = torch.randperm(case.all_rows, **how)[: case.rows]
    labels[chosen] = torch.randint(case.vocabulary, (case.rows,), **how)
    student = [x.requires_grad_() for x in model(case.student_width)]
    return Data(*model(case.teacher_width), *student, labels)


def plain_cross_entropy(data: Data) -> Tensor:
    _, student = data.heads()
    logits = F.linear(student.hidden, data.student_weight)
    return F.cross_entropy(logits.float(), data.labels[data.responses])


def our_cross_entropy(impl: Any, data: Data) -> Tensor:
    _, student = data.heads()
    return linear_cross_entropy(student, data.labels[data.responses], data.mean_weights(), impl=impl)


def ours(impl: Any, divergence: str, parameters: dict[str, Any], data: Data) -> Tensor:
    return linear_divergence(divergence, *data.heads(), data.mean_weights(), impl=impl, **parameters)


def bare_products(data: Data) -> Tensor:
    """The products that a distillation loss cannot do without, and nothing else: the student's logits."""
    teacher, student = data.heads()
    F.linear(teacher.hidden, teacher.weight)
    return F.linear(student.hidden, data.student_weight)


def authors_skew_kl(data: Data) -> Tensor:
    """Skew KL as its authors compute it: all rows, then the mask; the teacher's entropy, a constant, is left out."""
    teacher, student = (x.float().softmax(-1) for x in data.all_logits())
    cross = (teacher * (ALPHA * teacher + (1 - ALPHA) * student).log()).sum(-1)
    return -(cross * data.responses).sum() / data.responses.sum()


def _jsd_of_logits(teacher_hidden: Tensor, teacher_weight: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    with torch.no_grad():
        p = F.linear(teacher_hidden, teacher_weight).float().log_softmax(-1)
    q = F.linear(hidden, weight).float().log_softmax(-1)
    m = torch.logaddexp(p + math.log(BETA), q + math.log1p(-BETA))
    return (BETA * p.exp() * (p - m) + (1 - BETA) * q.exp() * (q - m)).sum(-1).mean()


@cache
def _compiled() -> Loss:
    return torch.compile(_jsd_of_logits, dynamic=True)


def compiled_jsd(data: Data) -> Tensor:
    """What torch.compile makes of the formula in plain torch, the responses alone."""
    teacher, student = data.heads()
    return _compiled()(teacher.hidden, data.teacher_weight, student.hidden, data.student_weight)


def trl_chunked(data: Data) -> Tensor:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    loss, *_ = _chunked_divergence_loss(
        data.student_hidden[None], data.teacher_hidden[None], data.student_weight, data.teacher_weight,
        data.responses[None].long(), beta=BETA,
    )  # fmt: skip
    return loss


def trl_full(data: Data) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    teacher, student = data.all_logits()
    return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], labels=data.labels[None], beta=BETA)


def liger(data: Data) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # Compiled, as it is by default, where it is meant to run. It defaults to half a cross-entropy.
    compiled = data.labels.is_cuda
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA, compiled=compiled)
    return loss(data.student_hidden, data.student_weight, data.teacher_hidden, data.teacher_weight, data.labels)


def contenders(device: str) -> dict[str, Loss]:
    impls = ["eager", "chunked", "triton"]
    found: dict[str, Loss] = {FLOOR: plain_cross_entropy, "matrix products alone": bare_products}
    found |= {f"cross-entropy, ours {impl}": partial(our_cross_entropy, impl) for impl in impls[1:]}
    chosen = {"JSD": ("jsd", {"beta": BETA}), "KL": ("forward_kl", {}), "SKL": ("skew_kl", {"alpha": ALPHA})}
    for label, (name, parameters) in chosen.items():
        found |= {f"{label}, ours {impl}": partial(ours, impl, name, parameters) for impl in impls}
    found["SKL, the authors' way"] = authors_skew_kl
    found |= {"JSD, TRL chunked": trl_chunked, "JSD, TRL full logits": trl_full, "JSD, Liger fused": liger}
    return found | ({"JSD, torch.compile": compiled_jsd} if device == "cuda" else {})


def run(loss: Loss, data: Data) -> tuple[Tensor, tuple[Tensor, ...]]:
    value = loss(data)
    d_value = value.detach() if value.ndim else None  # any gradient of logits will do
    return value.detach(), torch.autograd.grad(value, (data.student_hidden, data.student_weight), d_value)


class Errors:
    """How far gradients are from those that float32 gives for the same numbers: the larger norm ratio of the two."""

    def __init__(self, data: Data) -> None:
        exact = (x.detach().float() for x in (data.teacher_hidden, data.teacher_weight))
        student = (x.detach().float().requires_grad_() for x in (data.student_hidden, data.student_weight))
        self.data = Data(*exact, *student, data.labels)
        self.expected: dict[str, tuple[Tensor, ...]] = {}
        losses = {"JSD": ("jsd", {"beta": BETA}), "KL": ("forward_kl", {}), "SKL": ("skew_kl", {"alpha": ALPHA})}
        self.losses = {k: partial(ours, "chunked", name, how) for k, (name, how) in losses.items()}
        self.losses["cross-entropy"] = partial(our_cross_entropy, "chunked")

    def of(self, name: str, gradients: tuple[Tensor, ...]) -> float | None:
        kind = name.split(",")[0]
        if kind not in self.losses:
            return None
        if kind not in self.expected:
            self.expected = {kind: run(self.losses[kind], self.data)[1]}  # one at a time: they are large
        pairs = zip(gradients, self.expected[kind], strict=True)
        return max(((x - wanted).norm() / wanted.norm()).item() for x, wanted in pairs)


def compare(case: Case, only: str, repetitions: int, console: Console) -> list[dict[str, Any]]:
    data, results = make_data(case), {}
    losses = {name: loss for name, loss in contenders(case.device).items() if name == FLOOR or re.search(only, name)}
    errors = Errors(data) if case.rows <= LARGEST_WITH_ERRORS else None
    for name, loss in losses.items():
        results[name] = result = {"name": name, "status": "ok", "times": []}
        with console.status(f"{name}: first runs"):
            try:
                value, gradients = run(loss, data)
                result["loss"] = math.nan if value.ndim else value.item()
                result["gradient_error"] = errors and errors.of(name, gradients)
                del value, gradients
                result["peak_bytes"] = peak_memory(lambda loss=loss: run(loss, data), case.device)
            except Exception as error:  # a contender that cannot run is named, and the others go on
                status = next((text for kind, text in CANNOT.items() if isinstance(error, kind)), "failed")
                result |= {"status": status, "why": f"{type(error).__name__}: {error}".splitlines()[0]}
    del errors
    gc.collect()
    for turn in range(repetitions):
        with console.status(f"repetition {turn + 1} of {repetitions}"):
            for name, loss in losses.items():
                if results[name]["status"] == "ok":
                    results[name]["times"].append(seconds(lambda loss=loss: run(loss, data), case.device))
    return list(results.values())


def limit(case: Case, name: str, flops: float, bandwidth: float) -> float:
    """Seconds for the products alone, or to read the inputs and write the gradients once, whichever are more."""
    teacher = 0 if name.startswith("cross-entropy") else case.teacher_width
    products = 2 * case.rows * case.vocabulary * (3 * case.student_width + teacher)
    entries = (case.rows + case.vocabulary) * (2 * case.student_width + teacher)
    return max(products / flops, entries * DTYPES[case.dtype].itemsize / bandwidth)


def show(case: Case, results: list[dict[str, Any]], reached: tuple[float, float], console: Console) -> None:
    widths = f"widths {case.student_width} (student) and {case.teacher_width}"
    table = Table(title=f"{case.rows} responses of {case.all_rows} rows, V {case.vocabulary}, {widths}, {case.dtype}")
    clock = "CPU seconds" if case.device == "cpu" else "seconds"
    for column in ("", "ratio", clock, "extra MiB", "of limit", "error", "loss"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    floor = next((statistics.median(r["times"]) for r in results if r["name"] == FLOOR and r["times"]), math.nan)
    for result in results:
        if result["status"] != "ok":
            table.add_row(result["name"], result["status"])
            continue
        times, memory = result["times"], result["peak_bytes"]
        result["seconds"] = median = statistics.median(times)
        result["ratio"] = median / floor
        result["share_of_limit"] = limit(case, result["name"], *reached) / median
        table.add_row(
            result["name"],
            f"{result['ratio']:.2f}",
            f"{median:.4g}",
            "-" if memory is None else f"{memory / 2**20:,.0f}",
            f"{result['share_of_limit']:.0%}",
            "-" if result["gradient_error"] is None else f"{result['gradient_error']:.1e}",
            "-" if math.isnan(result["loss"]) else f"{result['loss']:.5f}",
        )
    console.print(table)
    for why in dict.fromkeys(f"{r['status']}: {r['why']}" for r in results if "why" in r):
        console.print(why, markup=False)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for vocabulary, widths, rows in itertools.product(options.vocabulary, options.widths, options.rows):
        student, teacher = map(int, widths.split(":"))
        all_rows = math.ceil(rows / options.share)
        yield Case(vocabulary, student, teacher, rows, all_rows, options.dtype, options.device)


def parse() -> argparse.Namespace:
    asked = parser(__doc__)
    asked.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    asked.add_argument("--dtype", choices=list(DTYPES), help="float32 on a CPU, else bfloat16")
    asked.add_argument("--vocabulary", type=int, nargs="+")
    asked.add_argument("--widths", nargs="+", metavar="STUDENT:TEACHER")
    asked.add_argument("--rows", type=int, nargs="+", help="rows of responses")
    asked.add_argument("--share", type=float, help="of the responses in all rows: 402/1024 on a CPU, else 1")
    asked.add_argument("--only", default="", help="contenders whose name this regular expression finds")
    asked.add_argument("--repetitions", type=int, default=5)
    options = asked.parse_args()
    for name, value in DEFAULTS[options.device].items():
        setattr(options, name, getattr(options, name) or value)
    return options


def main() -> None:
    options = parse()
    console, described = begin(options, options.device)
    reached, written = peaks(options.device, options.dtype), []
    console.print(f"a large product: {reached[0] / 1e12:.3g} Tflop/s; a large copy: {reached[1] / 1e9:.3g} GB/s")
    for case in cases(options):
        results = compare(case, options.only, options.repetitions, console)
        show(case, results, reached, console)
        written.append({"case": vars(case), "results": results})
        write(options, described, flops=reached[0], bandwidth=reached[1], cases=written)


if __name__ == "__main__":
    main()
