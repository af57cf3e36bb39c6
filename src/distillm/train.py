"""The training loop: one generator that yields after every optimizer step, and the one place that divides."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from .accounting import part
from .errors import DataError, TrainingError, first_of
from .heads import eval_mode
from .kernels import linear_cross_entropy, linear_divergence
from .methods import Method
from .schedules import Schedule
from .scoring import Pair
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
    rows: tuple[Example, ...] = ()
    skipped: bool = False


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

    The loss of a step is the same however its rows are split into micro-batches. The caller validates, saves or stops
    between steps. A step whose rows hold no target token changes nothing and is marked ``skipped``.

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
        sums: dict[str, Tensor] = {}
        watched: dict[str, tuple[Tensor, int]] = {}
        for micro in micro_batches(drawn.rows, micro_batch_size, pair.device, packed=pair.packed):
            here = [(term, weight / count) for term, weight, count in active if term.count(micro)]
            if not here:
                continue
            with accelerator.autocast():
                scored = pair.score(micro, state, with_teacher=any(term.reads_teacher for term, _ in here))
                with part("loss"):
                    totals = [(term, share, term.total(scored.only(term.origins))) for term, share in here]
            with part("student backward"):
                # Not accelerator.backward, which divides once more where the environment asks it to accumulate.
                torch.stack([share * total for _, share, total in totals]).sum().backward()
            for term, _, total in totals:
                sums[term.name] = sums.get(term.name, 0) + total.detach()
            for name, (total, count) in scored.figures.items():
                before = watched.get(name, (0, 0))
                watched[name] = before[0] + total, before[1] + count
        counts = {term.name: count for term, _, count in active}
        terms = {name: float(sums[name]) / count for name, count in counts.items()}
        rate = learning_rate(state)
        with part("optimizer"):
            norm = _update(pair, optimizer, rate, max_grad_norm, accelerator, terms, drawn, state) if active else 0.0
        figures = drawn.figures | {name: float(total) / max(count, 1) for name, (total, count) in watched.items()}
        for name, (total, count) in watched.items():
            state.observe(name, float(total), count)
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


def _update(
    pair: Pair,
    optimizer: Any,
    rate: float,
    max_grad_norm: float,
    accelerator: Accelerator,
    terms: dict[str, float],
    drawn: Draw,
    state: State,
) -> float:
    """One optimizer step, if everything is finite; the norm of the gradient before clipping."""
    norm = float(cast(Tensor, accelerator.clip_grad_norm_(pair.student.parameters(), max_grad_norm)))
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

    Raises:
        DataError: no row has a target token.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    count = 0
    with torch.no_grad(), eval_mode(pair.student):
        for rows in micro_batches(examples, batch_size, pair.device, packed=pair.packed):
            scored = pair.score(rows, state, with_teacher=pair.teacher is not None)
            ones = torch.ones(len(scored.labels), device=scored.labels.device)
            sums[0] += linear_cross_entropy(scored.student, scored.labels, ones).cpu()
            if scored.teacher is not None:
                sums[1] += linear_divergence(
                    divergence, scored.teacher, scored.student, ones, **cast(dict[str, Any], parameters)
                ).cpu()
            count += len(scored.labels)
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
