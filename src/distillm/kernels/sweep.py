"""The loop that the fused implementations share: a chunk of rows at a time, no ``[N, V]`` tensor for all ``N``.

The forward pass goes over the rows once. For each *chunk* the logits are formed by one large product, then scored by
*blocks*, whose gradient with respect to the product is written over it; two more products carry it to the hidden states
and the weight. Backward only scales what the forward pass computed.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..types import Head
from .eager import spread, wide

BYTE_BUDGET = {"cpu": 2**28}
"""Bytes by device type, beside the inputs and the gradients returned."""

CHUNK_ROWS = 4096
"""Where no bytes are named, a chunk has this many rows: products of that size run at a GPU's full speed, and most
batches are one chunk, which needs no sum of the weight's gradient in float32."""

BLOCK_BYTES = {"cpu": 2**23}
"""A block's tensors take this much, 512 MiB where not named: on a CPU, about what stays in cache."""


class Block(NamedTuple):
    """Rows to score: the product ``raw`` ``[n, V]`` of the student's head, and what is to be written.

    ``values`` ``[n]`` gets what the rows are worth, ``target``, where given, the gradient of ``weights @ values`` with
    respect to ``raw``. ``target`` may be ``raw`` itself.
    """

    raw: Tensor
    weights: Tensor
    values: Tensor
    target: Tensor | None


BlockScorer = Callable[[slice, Block], None]
"""(the block's rows of the chunk, the block): writes its values and its gradient."""


class Scorer(NamedTuple):
    """``open`` readies a chunk of rows. The numbers say how much memory a row takes in a chunk and in a block."""

    open: Callable[[slice], BlockScorer]
    chunk_row_bytes: int
    block_row_bytes: int


class Gradients(NamedTuple):
    """Of the student's head; None where none is wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


Sweep = Callable[[], tuple[Tensor, Tensor, Gradients]]


class Projection:
    """Forms the products of a head's chunks, one after the other, in one buffer.

    Rows are as long as the next multiple of ``align`` entries, and the weight as tall, so that any vocabulary is read
    in wide pieces and multiplied at full speed: on an H200 products of 50,257 columns reached a seventh of what those
    of 151,936 do. Beyond the vocabulary a product is ``-inf``; a gradient written over it is 0 there.
    """

    def __init__(self, head: Head, align: int = 1) -> None:
        device = head.hidden.device.type
        if head.weight is not None and torch.is_autocast_enabled(device) and head.hidden.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            with torch.no_grad():
                hidden, weight = head.hidden.to(dtype), head.weight.to(dtype)
                head = head._replace(
                    hidden=hidden, weight=weight, bias=head.bias if head.bias is None else head.bias.to(dtype)
                )
        self.head = head
        self.num_tokens = head.num_tokens
        self.row_length = 0 if head.weight is None else math.ceil(self.num_tokens / align) * align
        self.weight, self.bias = self._padded(head.weight), self._padded(head.bias)
        self.row_bytes = (self.row_length or head.listed or 0) * head.hidden.itemsize
        self.buffer: Tensor | None = None

    def __call__(self, rows: slice) -> Tensor:
        """The product of ``rows``: ``[n, V]``, which the next call overwrites. The first call must be the largest."""
        hidden, weight = self.head.hidden[rows], self.weight
        if self.head.listed is not None:
            return spread(hidden, self.head.listed)
        if weight is None:
            return hidden
        if self.buffer is None:
            self.buffer = hidden.new_empty(len(hidden), self.row_length)
        out = self.buffer[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, weight.T, out=out)
        else:
            torch.addmm(self.bias, hidden, weight.T, out=out)
        if self.row_length > self.num_tokens:
            out[:, self.num_tokens :] = -torch.inf
        return out[:, : self.num_tokens]

    def whole(self, num_rows: int) -> Tensor:
        """The rows of the last product, ``[num_rows, row_length]``, with what was written over them."""
        assert self.buffer is not None
        return self.buffer[:num_rows]

    def _padded(self, tensor: Tensor | None) -> Tensor | None:
        """``tensor`` with rows for the columns beyond the vocabulary, whatever they hold: nothing comes of them."""
        if tensor is None or len(tensor) == self.row_length:
            return tensor
        longer = tensor._base  # a head narrowed to shared tokens has the rows of the others behind its own
        if longer is not None and tensor.data_ptr() == longer.data_ptr() and len(longer) >= self.row_length:
            return longer.detach()[: self.row_length]
        return F.pad(tensor.detach(), [0, 0] * (tensor.ndim - 1) + [0, self.row_length - len(tensor)])


def fused(
    scorer: Scorer, project: Projection, student: Head, weights: Tensor, byte_budget: int | None
) -> tuple[Tensor, Tensor]:
    """``weights @ values``, differentiable in ``student``, and the values ``[N]``; ``project`` is the student's."""
    # Grad mode and autocast are read here: a Function's forward runs with the one off, and must run without the other.
    sweep = partial(_sweep, scorer, project, student, wants(student), weights, byte_budget)
    with torch.autocast(student.hidden.device.type, enabled=False):
        return _Fused.apply(sweep, *student[:3])


def wants(student: Head) -> list[bool]:
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
    weights = weights.to(dtype).contiguous()
    values = torch.empty_like(weights)
    chunk, block = row_counts(scorer, project, num_rows, byte_budget)
    # Sums over chunks are kept in float32 until they are complete. Of one chunk, the product is the sum.
    one = student.weight is not None and chunk >= num_rows > 0 and student.weight.dtype == head.hidden.dtype
    dtypes = student.hidden.dtype, head.hidden.dtype if one else dtype, dtype
    tensors = [(x if w else None, d) for x, w, d in zip(student[:3], wanted, dtypes, strict=True)]
    begin = torch.zeros if student.weight is None or num_rows == 0 else torch.empty
    rows_of = (num_rows, project.row_length, project.row_length)
    grads = Gradients(
        *(
            None if x is None else begin((n, *x.shape[1:]), dtype=d, device=x.device)
            for n, (x, d) in zip(rows_of, tensors, strict=True)
        )
    )
    for rows in slices(num_rows, chunk):
        raw, score = project(rows), scorer.open(rows)
        target = raw if head.weight is not None else None if grads.hidden is None else grads.hidden[rows]
        target = target if any(wanted) else None
        for part in slices(len(raw), block):
            d_raw = None if target is None else target[part]
            score(part, Block(raw[part], weights[rows][part], values[rows][part], d_raw))
        if project.weight is not None:
            _carry(project.whole(len(raw)), rows, head.hidden[rows], project, grads)
    done = Gradients(
        *(None if g is None or x is None else g[: len(x)].to(x.dtype) for g, (x, _) in zip(grads, tensors, strict=True))
    )
    return weights @ values, values, done


def _carry(d_raw: Tensor, rows: slice, hidden: Tensor, project: Projection, grads: Gradients) -> None:
    """From the gradient of a chunk's product to those of its hidden states, the weight and the bias."""
    if grads.hidden is not None:
        assert project.weight is not None
        grads.hidden[rows] = d_raw @ project.weight
    if grads.weight is not None:
        _add_product(grads.weight, d_raw.T, hidden, first=rows.start == 0)
    if grads.bias is not None:
        _add(grads.bias, d_raw.sum(0, dtype=grads.bias.dtype), first=rows.start == 0)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``_add(total, a @ b)``, in one pass over ``total`` where there is a product that sums in its dtype."""
    beta = 0 if first else 1
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, total.dtype, beta=beta, out=total)
    else:
        _add(total, a @ b, first)


def _add(total: Tensor, part: Tensor, first: bool) -> None:
    """``total += part``; what is in the memory of ``total`` before its first part is not read."""
    total.copy_(part) if first else total.add_(part)


def row_counts(scorer: Scorer, project: Projection, num_rows: int, byte_budget: int | None) -> tuple[int, int]:
    """Rows of a chunk and of a block: as many as ``byte_budget`` holds, at least one, in chunks of about one size.

    Where scoring takes no memory of its own, a chunk is one block.
    """
    chunk_row, block_row = scorer.chunk_row_bytes + project.row_bytes, scorer.block_row_bytes
    device = project.head.hidden.device.type
    if byte_budget is None:
        byte_budget = BYTE_BUDGET.get(device)
    block = 0
    if block_row:
        block = max(BLOCK_BYTES.get(device, 2**29) // block_row, 1)
        if byte_budget is not None:
            block = max(min(block, byte_budget // (chunk_row + block_row)), 1)
    if not chunk_row:
        chunk = num_rows
    elif byte_budget is None:
        chunk = CHUNK_ROWS
    else:
        chunk = (byte_budget - block * block_row) // chunk_row
    num_chunks = max(math.ceil(num_rows / max(chunk, block, 1)), 1)
    chunk = max(math.ceil(num_rows / num_chunks), 1)
    return chunk, math.ceil(chunk / math.ceil(chunk / block)) if block else chunk


def slices(num_rows: int, size: int) -> Iterator[slice]:
    """``num_rows`` rows, ``size`` at a time."""
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))
