"""The training loop: one generator that yields after every optimizer step, and the one place that divides."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from .accounting import part
from .errors import DataError, TrainingError, first_of
from .heads import eval_mode
from .kernels import linear_cross_entropy, linear_divergence
from .losses import Term
from .methods import Method
from .notebook import facts_table
from .processes import count as num_processes
from .processes import most, share, together
from .schedules import Schedule
from .scoring import Pair
from .sharding import full, whole, within_step
from .sources import Draw
from .types import Example, State


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. ``loss`` is the weighted sum of ``terms``, each a mean over its own count."""

    step: int
    loss: float
    terms: dict[str, float]
    counts: dict[str, int]
    lr: float
    grad_norm: float
    seconds: float
    tokens: int
    batch: str
    figures: dict[str, float | None] = field(default_factory=dict[str, float | None])
    rows: tuple[Example, ...] = field(default=(), repr=False)
    skipped: bool = False

    def _repr_html_(self) -> str:
        numbers = {"loss": self.loss, **self.terms, **self.figures, "learning rate": self.lr, "seconds": self.seconds}
        shown = [(name, f"{value:.4g}") for name, value in numbers.items() if value is not None]
        return facts_table(f"step {self.step}{' (skipped)' if self.skipped else f', {self.batch}'}", shown)


def training_steps(
    pair: Pair,
    method: Method,
    optimizer: Any,
    state: State,
    *,
    accelerator: Accelerator,
    learning_rate: Schedule,
    micro_batch_size: int = 8,
    max_grad_norm: float = 1.0,
) -> Iterator[Step]:
    """Train until ``state.step`` reaches ``state.total_steps``, yielding after each optimizer step.

    The loss of a step is the same however its rows are split into micro-batches, and dealt out to processes. The caller
    validates, saves or stops between steps. A step whose rows hold no target token changes nothing and is marked
    ``skipped``.

    Raises:
        TrainingError: the loss or the gradient is not finite; the weights are still those of the step before.
    """
    pair.student.train()
    while state.step < state.total_steps:
        began = time.perf_counter()
        with part("data"):
            drawn = method.source(state)
        active = [(term, term.weight(state), term.count(drawn.rows)) for term in method.loss]
        active = [(term, weight, count) for term, weight, count in active if weight != 0 and count > 0]
        sums, watched = _backward(pair, drawn.rows, active, state, accelerator, micro_batch_size)
        counts = {term.name: count for term, _, count in active}
        terms = {name: sums[name] / count for name, count in counts.items()}
        rate = learning_rate(state)
        with part("optimizer"):
            norm = _update(pair, optimizer, rate, max_grad_norm, terms, drawn, state) if active else 0.0
        figures = drawn.figures | {name: total / max(count, 1) for name, (total, count) in watched.items()}
        for name, (total, count) in watched.items():
            state.observe(name, total, count)
        state.step += 1
        yield Step(
            step=state.step,
            loss=sum(weight * terms[term.name] for term, weight, _ in active),
            terms=terms,
            counts=counts,
            lr=rate,
            grad_norm=norm,
            seconds=time.perf_counter() - began,
            tokens=sum(len(row.tokens) for row in drawn.rows),
            batch=drawn.batch,
            figures=figures,
            rows=tuple(drawn.rows),
            skipped=not active,
        )


Active = Sequence[tuple[Term, float, int]]
"""The terms of a step with their weights and what they are divided by."""


@dataclass(frozen=True)
class _Part:
    """A micro-batch of this process. With ``scale`` 0 it takes part in what the processes do together, and no more."""

    rows: Sequence[Example]
    scale: float
    reads_teacher: bool


def _parts(pair: Pair, rows: Sequence[Example], active: Active, size: int) -> list[_Part]:
    """This process's share of a step, in as many parts as any process has, and of the same kinds."""
    parts: list[_Part] = []
    for text in (False, True):
        kind = sorted((r for r in rows if (r.origin == "text") == text), key=lambda r: len(r.tokens), reverse=True)
        terms = [term for term, _, _ in active if term.count(kind)]
        reads_teacher = any(term.reads_teacher for term in terms)
        mine = micro_batches(share(kind), size, pair.device, packed=pair.packed)
        mine = [micro for micro in mine if any(term.count(micro) for term in terms)]
        parts += [_Part(micro, float(num_processes()), reads_teacher) for micro in mine]
        if short := most(len(mine)) - len(mine):
            idle = next(row for row in reversed(kind) if any(term.count([row]) for term in terms))
            parts += [_Part([idle], 0.0, reads_teacher)] * short
    return parts


def _backward(
    pair: Pair, rows: Sequence[Example], active: Active, state: State, accelerator: Accelerator, size: int
) -> tuple[dict[str, float], dict[str, tuple[float, int]]]:
    """Add the gradient of a step's loss; the sums of its terms, and those of the figures that they watch."""
    parts = _parts(pair, rows, active, size)
    sums: list[dict[str, Tensor]] = []
    watched: list[dict[str, tuple[Tensor, int]]] = []
    for number, micro in enumerate(parts, 1):
        here = [(term, micro.scale * weight / count) for term, weight, count in active if term.count(micro.rows)]
        with within_step(pair.student, last=number == len(parts)):
            with accelerator.autocast():
                scored = pair.score(micro.rows, state, with_teacher=micro.reads_teacher)
                with part("loss"):
                    totals = [(term, weight, term.total(scored.only(term.origins))) for term, weight in here]
            with part("student backward"):
                # Not accelerator.backward, which divides once more where the environment asks it to accumulate.
                torch.stack([weight * total for _, weight, total in totals]).sum().backward()
        if micro.scale:
            sums.append({term.name: total.detach() for term, _, total in totals})
            watched.append(scored.figures)
    own = _added([{name: (total, 0) for name, total in each.items()} for each in sums]), _added(watched)
    told = together(lambda: [{name: (float(x), n) for name, (x, n) in each.items()} for each in own])
    terms, figures = (_added([each[kind] for each in told]) for kind in (0, 1))
    return {name: total for name, (total, _) in terms.items()}, figures


N = TypeVar("N", float, Tensor)


def _added(each: Sequence[dict[str, tuple[N, int]]]) -> dict[str, tuple[N, int]]:
    """Sums and counts by name."""
    found: dict[str, tuple[Any, int]] = {}
    for totals in each:
        for name, (total, count) in totals.items():
            before = found.get(name, (0, 0))
            found[name] = before[0] + total, before[1] + count
    return found


def _update(
    pair: Pair,
    optimizer: Any,
    rate: float,
    max_grad_norm: float,
    terms: dict[str, float],
    drawn: Draw,
    state: State,
) -> float:
    """One optimizer step, if everything is finite; the norm of the gradient before clipping."""
    norm = float(full(torch.nn.utils.clip_grad_norm_(pair.student.parameters(), max_grad_norm)))
    figures = {**terms, "gradient norm": norm}
    wrong = [name for name, value in figures.items() if not abs(value) < float("inf")]
    if wrong:
        optimizer.zero_grad()
        shown = ", ".join(f"{name} = {figures[name]}" for name in wrong)
        ids = [row.id for row in drawn.rows]
        raise TrainingError(
            f"step {state.step + 1}: {shown}. The weights were not changed by this step.\n"
            f"rows of the batch: {first_of(ids)}\n"
            "Try a lower optim.lr, look at these rows, or train in float32.",
            rows=ids,
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return norm


OVERHEAD = {"cpu": 32}
"""What a micro-batch costs beside its tokens, in tokens by device type, 2048 where not named: on a GPU small ones leave
most of it idle."""


def micro_batches(
    rows: Sequence[Example], size: int, device: torch.device, *, packed: bool = False
) -> list[list[Example]]:
    """``rows`` in parts of at most ``size``, with plain text apart, cut by length where that saves the most padding.

    Rows that are ``packed`` have none to save.
    """
    parts: list[list[Example]] = []
    for text in (False, True):
        group = sorted((r for r in rows if (r.origin == "text") == text), key=lambda r: len(r.tokens), reverse=True)
        if packed:
            parts += [group[at : at + size] for at in range(0, len(group), size)]
        else:
            parts += _cut(group, size, OVERHEAD.get(device.type, 2048))
    return parts


def _cut(rows: list[Example], size: int, overhead: int) -> list[list[Example]]:
    """The cheapest parts of ``rows``, the longest first; one costs its first length for each row, and ``overhead``."""
    least, taken = [0], [0]
    for end in range(1, len(rows) + 1):
        firsts = range(max(0, end - size), end)
        cost, at = min((least[at] + len(rows[at].tokens) * (end - at) + overhead, at) for at in firsts)
        least.append(cost)
        taken.append(at)
    parts: list[list[Example]] = []
    end = len(rows)
    while end:
        parts.append(rows[taken[end] : end])
        end = taken[end]
    return parts[::-1]


def validate(
    pair: Pair, examples: Sequence[Example], state: State, *, divergence: str, batch_size: int, **parameters: float
) -> dict[str, float]:
    """Mean cross-entropy and, with a teacher, mean ``divergence`` to it, per target token of ``examples`` (nats).

    Several processes share the examples.

    Raises:
        DataError: no row has a target token.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    count = 0
    with torch.no_grad(), eval_mode(pair.student), whole(pair.student):
        for rows in pair.in_step(micro_batches(share(examples), batch_size, pair.device, packed=pair.packed)):
            scored = pair.score(rows, state, with_teacher=pair.teacher is not None)
            ones = torch.ones(len(scored.labels), device=scored.labels.device)
            sums[0] += linear_cross_entropy(scored.student, scored.labels, ones).cpu()
            if scored.teacher is not None:
                sums[1] += linear_divergence(
                    divergence, scored.teacher, scored.student, ones, **cast(dict[str, Any], parameters)
                ).cpu()
            count += len(scored.labels)
    told = together(lambda: (sums, count))
    sums, count = torch.stack([total for total, _ in told]).sum(0), sum(n for _, n in told)
    if not count:
        raise DataError("there is nothing to validate on: no row has a response; give validation rows that have one")
    means = (sums / count).tolist()
    result = {"cross_entropy": means[0]}
    return result | {"divergence": means[1]} if pair.teacher is not None else result


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
