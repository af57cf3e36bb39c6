"""What a row is worth: a scorer turns a block's ``log q`` into values and the gradient with respect to the logits."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import Divergence, adaptive_kl
from ..types import IGNORE, Head
from .closed_form import CLOSED_FORMS, FLOOR, ClosedForm, Scored, closed_form
from .eager import Parameters, shape_logits

BlockScorer = Callable[[slice, Tensor], Scored]
"""(rows of the chunk, their ``log q`` ``[n, V]``, which it may overwrite) -> values, what makes d value / d logits."""


class Scorer(NamedTuple):
    """``open`` readies a chunk of rows. The numbers say how much memory a row takes in a chunk and in a block."""

    open: Callable[[slice], BlockScorer]
    chunk_row_bytes: int
    block_tensors: int


class Projection:
    """Forms the products of a head's chunks, one after the other, in one buffer."""

    def __init__(self, head: Head) -> None:
        device = head.hidden.device.type
        if head.weight is not None and torch.is_autocast_enabled(device) and head.hidden.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            with torch.no_grad():
                hidden, weight = head.hidden.to(dtype), head.weight.to(dtype)
                head = head._replace(
                    hidden=hidden, weight=weight, bias=head.bias if head.bias is None else head.bias.to(dtype)
                )
        self.head = head
        self.row_bytes = 0 if head.weight is None else head.weight.shape[0] * head.hidden.itemsize
        self.buffer: Tensor | None = None

    def __call__(self, rows: slice) -> Tensor:
        """The product of ``rows``: ``[n, V]``, which the next call overwrites. The first call must be the largest."""
        hidden, weight, bias = self.head.hidden[rows], self.head.weight, self.head.bias
        if weight is None:
            return hidden
        if self.buffer is None:
            self.buffer = hidden.new_empty(len(hidden), weight.shape[0])
        out = self.buffer[: len(hidden)]
        return torch.mm(hidden, weight.T, out=out) if bias is None else torch.addmm(bias, hidden, weight.T, out=out)


def divergence_scorer(
    divergence: Divergence, project: Projection, parameters: Parameters, *, needs_gradient: bool
) -> Scorer:
    """``divergence(log p, log q)``, in closed form where it has one, by autograd on the block otherwise."""
    form = closed_form(divergence, parameters)

    def open_chunk(chunk: slice) -> BlockScorer:
        raw = project(chunk)

        def score(block: slice, log_q: Tensor) -> Scored:
            log_p = shape_logits(raw[block], project.head).log_softmax(-1, dtype=log_q.dtype)
            rows = slice(chunk.start + block.start, chunk.start + block.stop)
            columns = {k: v[rows, None].to(log_q.dtype) if isinstance(v, Tensor) else v for k, v in parameters.items()}
            if form is not None:
                return _in_closed_form(form, log_p, log_q, columns)
            return _by_autograd(divergence, log_p, log_q, columns, needs_gradient)

        return score

    plain = form is not None and divergence in CLOSED_FORMS and divergence is not adaptive_kl  # which sorts
    return Scorer(open_chunk, project.row_bytes, 10 if plain else 24)


def _in_closed_form(form: ClosedForm, log_p: Tensor, log_q: Tensor, columns: Parameters) -> Scored:
    p, q = log_p.exp(), log_q.exp()
    values, make = form(log_p.clamp_(min=FLOOR), log_q.clamp_(min=FLOOR), p, q, **columns)

    def gradient() -> Tensor:
        g = make()
        return g.addcmul_(q, g.sum(-1, keepdim=True), value=-1)

    return values, gradient


def _by_autograd(
    divergence: Divergence, log_p: Tensor, log_q: Tensor, columns: Parameters, needs_gradient: bool
) -> Scored:
    with torch.set_grad_enabled(needs_gradient):
        leaf = log_q.detach().requires_grad_(needs_gradient)
        values = divergence(log_p, leaf, **columns)
    if values.shape != log_q.shape[:1]:
        raise ValueError(
            f"the divergence returned shape {tuple(values.shape)} for {tuple(log_q.shape)}; return one value per row, "
            "[..., V] -> [...]"
        )

    def gradient() -> Tensor:
        (g,) = torch.autograd.grad(values, leaf, torch.ones_like(values))
        return torch.addcmul(g, log_q.exp_(), g.sum(-1, keepdim=True), value=-1)

    return values.detach(), gradient


def cross_entropy_scorer(labels: Tensor) -> Scorer:
    """``-log q[label]``, whose gradient is ``q`` less 1 at the label; both 0 where the label is ``IGNORE``."""

    def open_chunk(chunk: slice) -> BlockScorer:
        ignored = labels[chunk, None] == IGNORE
        chosen = labels[chunk, None].masked_fill(ignored, 0)

        def score(block: slice, log_q: Tensor) -> Scored:
            index, skipped = chosen[block], ignored[block]
            values = log_q.gather(-1, index).neg_().masked_fill_(skipped, 0.0)

            def gradient() -> Tensor:
                dz = log_q.exp_()
                return dz.scatter_add_(-1, index, dz.new_full(index.shape, -1.0)).masked_fill_(skipped, 0.0)

            return values.squeeze(-1), gradient

        return score

    return Scorer(open_chunk, chunk_row_bytes=0, block_tensors=5)
