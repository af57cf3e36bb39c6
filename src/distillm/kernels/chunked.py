"""The same values and gradients as ``eager`` by plain operators, on blocks of rows that fit a CPU's cache.

What a row is worth is a scorer's business: it turns a block's ``log q`` into values and the gradient with respect to
the logits. The loop around it is in ``sweep``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..divergences import Divergence, adaptive_kl
from ..types import IGNORE, Head
from .closed_form import CLOSED_FORMS, FLOOR, ClosedForm, Scored, closed_form
from .eager import Parameters, shape_logits, wide
from .sweep import Block, BlockScorer, Projection, Scorer, fused, wants

Score = Callable[[slice, Tensor], Scored]
"""(rows of the chunk, their ``log q`` ``[n, V]``, which it may overwrite) -> values, what makes d value / d logits."""


def divergence_rows(
    divergence: Divergence,
    teacher: Head,
    student: Head,
    weights: Tensor,
    parameters: Parameters,
    byte_budget: int | None,
) -> tuple[Tensor, Tensor]:
    """``weights @ values`` and the values ``[N]`` of ``divergence``."""
    project = Projection(student)
    scorer = divergence_scorer(divergence, Projection(teacher), project, parameters, needs_gradient=any(wants(student)))
    return fused(scorer, project, student, weights, byte_budget)


def cross_entropy_rows(
    student: Head, labels: Tensor, weights: Tensor, byte_budget: int | None
) -> tuple[Tensor, Tensor]:
    """``weights @ values`` and the values ``[N]`` of the cross-entropy with ``labels`` ``[N]``."""
    project = Projection(student)
    return fused(cross_entropy_scorer(labels, project), project, student, weights, byte_budget)


def divergence_scorer(
    divergence: Divergence, teacher: Projection, student: Projection, parameters: Parameters, *, needs_gradient: bool
) -> Scorer:
    """``divergence(log p, log q)``, in closed form where it has one, by autograd on the block otherwise."""
    form = closed_form(divergence, parameters)

    def open_chunk(chunk: slice) -> BlockScorer:
        raw = teacher(chunk)

        def score(block: slice, log_q: Tensor) -> Scored:
            log_p = shape_logits(raw[block], teacher.head).log_softmax(-1, dtype=log_q.dtype)
            rows = slice(chunk.start + block.start, chunk.start + block.stop)
            columns = {k: v[rows, None].to(log_q.dtype) if isinstance(v, Tensor) else v for k, v in parameters.items()}
            if form is not None:
                return _in_closed_form(form, log_p, log_q, columns)
            return _by_autograd(divergence, log_p, log_q, columns, needs_gradient)

        return _on_log_q(student.head, score)

    plain = form is not None and divergence in CLOSED_FORMS and divergence is not adaptive_kl  # which sorts
    return Scorer(open_chunk, teacher.row_bytes, _row_bytes(student, 10 if plain else 24))


def cross_entropy_scorer(labels: Tensor, student: Projection) -> Scorer:
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

        return _on_log_q(student.head, score)

    return Scorer(open_chunk, 0, _row_bytes(student, 5))


def _row_bytes(student: Projection, num_tensors: int) -> int:
    """What a row of a block takes where ``num_tensors`` of its size live at once."""
    return num_tensors * student.num_tokens * wide(student.head.hidden.dtype).itemsize


def _on_log_q(head: Head, score: Score) -> BlockScorer:
    """``score`` on the logits of ``head``, its gradient carried back to their product."""

    def score_block(rows: slice, block: Block) -> None:
        z = shape_logits(block.raw, head)
        block.values[:], gradient = score(rows, z.log_softmax(-1))
        if block.target is None:
            return
        dz = gradient().mul_(block.weights[:, None])
        if head.weight is not None and head.softcap is not None:
            dz.mul_(1 - (z / head.softcap).square_())
        if head.weight is not None and head.scale != 1.0:
            dz.mul_(head.scale)
        block.target[:] = dz

    return score_block


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
