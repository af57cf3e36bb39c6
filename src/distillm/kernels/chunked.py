"""The same values and gradients as ``eager``, a chunk of rows at a time: no ``[N, V]`` tensor for all ``N`` is formed.

The forward pass goes over the rows once. For each *chunk* the logits are formed by one large product, then scored by
*blocks* (on a CPU small enough for its cache), whose gradient with respect to the logits is written over the logits;
two more products carry it to the hidden states and the weight. Backward only scales what the forward pass computed.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..divergences import Divergence
from ..types import Head
from .eager import Parameters, shape_logits, wide
from .scorers import BlockScorer, Projection, Scorer, cross_entropy_scorer, divergence_scorer

BYTE_BUDGET = {"cpu": 2**28}
"""Bytes by device type, 1 GiB where not named, beside the inputs and the gradients returned."""

BLOCK_BYTES = {"cpu": 2**23}
"""Of which a block's tensors take this much, 256 MiB where not named: on a CPU, about what stays in cache."""


class Gradients(NamedTuple):
    """Of the student's head; None where none is wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


Sweep = Callable[[], tuple[Tensor, Tensor, Gradients]]


def divergence_rows(
    divergence: Divergence,
    teacher: Head,
    student: Head,
    weights: Tensor,
    parameters: Parameters,
    byte_budget: int | None,
) -> tuple[Tensor, Tensor]:
    """``weights @ values`` and the values ``[N]`` of ``divergence``."""
    scorer = divergence_scorer(divergence, Projection(teacher), parameters, needs_gradient=any(_wanted(student)))
    return _fused(scorer, student, weights, byte_budget)


def cross_entropy_rows(
    student: Head, labels: Tensor, weights: Tensor, byte_budget: int | None
) -> tuple[Tensor, Tensor]:
    """``weights @ values`` and the values ``[N]`` of the cross-entropy with ``labels`` ``[N]``."""
    return _fused(cross_entropy_scorer(labels), student, weights, byte_budget)


def _fused(scorer: Scorer, student: Head, weights: Tensor, byte_budget: int | None) -> tuple[Tensor, Tensor]:
    # Grad mode and autocast are read here: a Function's forward runs with the one off, and must run without the other.
    sweep = partial(_sweep, scorer, Projection(student), student, _wanted(student), weights, byte_budget)
    with torch.autocast(student.hidden.device.type, enabled=False):
        return _Fused.apply(sweep, *student[:3])


def _wanted(student: Head) -> list[bool]:
    """Which of hidden, weight and bias need a gradient: none under ``no_grad``."""
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in student[:3]]


class _Fused(torch.autograd.Function):
    """Runs ``sweep`` and keeps the gradients it made; the other inputs tell autograd whose gradients they are."""

    @staticmethod
    def forward(ctx: Any, sweep: Sweep, *_: Tensor | None) -> tuple[Tensor, Tensor]:
        total, values, ctx.gradients = sweep()
        ctx.mark_non_differentiable(values)
        return total, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise RuntimeError(
                "second backward through a chunked loss: its gradients are made once, in the forward pass. "
                "Compute the loss again, add up the losses before one backward, or use impl='eager'"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(None if g is None else g.mul_(upstream[0]) for g in gradients)


def _sweep(
    scorer: Scorer, project: Projection, student: Head, wanted: list[bool], weights: Tensor, byte_budget: int | None
) -> tuple[Tensor, Tensor, Gradients]:
    """Score all rows: ``weights @ values``, the values ``[N]``, and the gradients of the former."""
    head, dtype, num_rows = project.head, wide(project.head.hidden.dtype), len(student.hidden)
    weights = weights.to(dtype)
    values = torch.empty_like(weights)
    # Whatever the dtype of the weight, sums over rows are kept in float32 until they are complete.
    dtypes = student.hidden.dtype, dtype, dtype
    tensors = [(x if w else None, d) for x, w, d in zip(student[:3], wanted, dtypes, strict=True)]
    grads = Gradients(*(None if x is None else torch.zeros_like(x, dtype=d) for x, d in tensors))
    chunk, block = _row_counts(scorer, project, num_rows, byte_budget)
    for rows in _slices(num_rows, chunk):
        raw, score = project(rows), scorer.open(rows)
        target = raw if head.weight is not None else None if grads.hidden is None else grads.hidden[rows]
        for part in _slices(len(raw), block):
            _score_block(head, raw, score, part, weights[rows], values[rows], target if any(wanted) else None)
        if head.weight is not None:
            _carry(raw, rows, head.hidden[rows], head.weight, grads)
    done = Gradients(
        *(None if g is None or x is None else g.to(x.dtype) for g, (x, _) in zip(grads, tensors, strict=True))
    )
    return weights @ values, values, done


def _score_block(
    head: Head, raw: Tensor, score: BlockScorer, rows: slice, weights: Tensor, values: Tensor, target: Tensor | None
) -> None:
    """Write the block's values and, over ``target``, its gradient with respect to ``raw``; its tensors die here."""
    z = shape_logits(raw[rows], head)
    values[rows], gradient = score(rows, z.log_softmax(-1))
    if target is None:
        return
    dz = gradient().mul_(weights[rows, None])
    if head.weight is not None and head.softcap is not None:
        dz.mul_(1 - (z / head.softcap).square_())
    if head.weight is not None and head.scale != 1.0:
        dz.mul_(head.scale)
    target[rows] = dz


def _carry(d_raw: Tensor, rows: slice, hidden: Tensor, weight: Tensor, grads: Gradients) -> None:
    """From the gradient of a chunk's product to those of its hidden states, the weight and the bias."""
    if grads.hidden is not None:
        grads.hidden[rows] = d_raw @ weight
    if grads.weight is not None:
        if grads.weight.dtype == d_raw.dtype:
            grads.weight.addmm_(d_raw.T, hidden)
        else:
            grads.weight.add_(d_raw.T @ hidden)
    if grads.bias is not None:
        grads.bias.add_(d_raw.sum(0, dtype=grads.bias.dtype))


def _row_counts(scorer: Scorer, project: Projection, num_rows: int, byte_budget: int | None) -> tuple[int, int]:
    """Rows of a chunk and of a block: as many as ``byte_budget`` holds, at least one, in chunks of about one size."""
    head = project.head
    num_tokens = head.hidden.shape[1] if head.weight is None else head.weight.shape[0]
    block_row = scorer.block_tensors * num_tokens * wide(head.hidden.dtype).itemsize
    chunk_row = scorer.chunk_row_bytes + project.row_bytes
    device = head.hidden.device.type
    byte_budget = BYTE_BUDGET.get(device, 2**30) if byte_budget is None else byte_budget
    block = max(min(byte_budget // (chunk_row + block_row), BLOCK_BYTES.get(device, 2**28) // block_row), 1)
    chunk = max((byte_budget - block * block_row) // chunk_row, block) if chunk_row else max(num_rows, 1)
    num_chunks = max(math.ceil(num_rows / chunk), 1)
    return max(math.ceil(num_rows / num_chunks), 1), block


def _slices(num_rows: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))
