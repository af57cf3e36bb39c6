"""The same values and gradients as ``eager``, by one Triton kernel for a chunk's rows between the large products.

Scoring takes no memory beside the products: each row's gradient is written over its logits. ``triton_kernels`` holds
the kernels, ``sweep`` the loop around them.
"""

import inspect
import warnings
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import triton
from torch import Tensor

from .. import divergences
from ..divergences import Bucketed, Divergence, check_exponents, check_weight
from ..types import Head
from . import triton_kernels as kernels
from .eager import Parameters
from .sweep import Block, BlockScorer, Projection, Scorer, fused

ALIGN = 64
"""Rows of a product begin at multiples of this many entries: wide loads for any vocabulary, and faster products."""

LARGEST_TILE = 2048
"""Entries of a row that a program holds at once: eight for each of its threads."""

TERMS: dict[Divergence, Any] = {
    divergences.forward_kl: kernels.forward_kl,
    divergences.reverse_kl: kernels.reverse_kl,
    divergences.jsd: kernels.jsd,
    divergences.skew_kl: kernels.skew_kl,
    divergences.skew_reverse_kl: kernels.skew_reverse_kl,
    divergences.total_variation: kernels.total_variation,
    divergences.symmetric_kl: kernels.symmetric_kl,
    divergences.alpha_beta: kernels.alpha_beta,
}
"""All named divergences but ``adaptive_kl``, which sorts: where its head ends depends on the order of a sum."""

AT_ZERO: dict[Divergence, Any] = {
    divergences.skew_kl: kernels.forward_kl,
    divergences.skew_reverse_kl: kernels.reverse_kl,
}
BY_ROW: dict[Divergence, Any] = {
    divergences.skew_kl: kernels.skew_kl_by_row,
    divergences.skew_reverse_kl: kernels.skew_reverse_kl_by_row,
}
"""Where the weight is 0, and where it may be in some row: the mixture is then one of the two, and may underflow."""


class Form(NamedTuple):
    """The terms of a divergence with its numbers; ``per_row``, where given, holds ``a`` for each row, ``[N]``."""

    terms: Any
    a: float = 0.0
    b: float = 0.0
    per_row: Tensor | None = None


def divergence_rows(
    divergence: Divergence,
    teacher: Head,
    student: Head,
    weights: Tensor,
    parameters: Parameters,
    byte_budget: int | None,
) -> tuple[Tensor, Tensor]:
    """``weights @ values`` and the values ``[N]`` of ``divergence``, to which there must be no ``obstacle``."""
    form = _form(divergence, parameters)
    project, teacher_products = Projection(student, ALIGN), Projection(teacher, ALIGN)

    def open_chunk(chunk: slice) -> BlockScorer:
        def score(block_rows: slice, block: Block) -> None:
            # The student's products stay for the gradients' own; the teacher's are needed here alone.
            rows = slice(chunk.start + block_rows.start, chunk.start + block_rows.stop)
            _launch(
                kernels.divergence_kernel,
                block,
                (*_readable(teacher_products(rows), teacher_products.head), *_readable(block.raw, project.head)),
                per_row=None if form.per_row is None else form.per_row[rows],
                a=form.a,
                b=form.b,
                TERMS=form.terms,
                KNOWN_SUM=form.terms is kernels.forward_kl,
            )

        return score

    return fused(Scorer(open_chunk, 0, teacher_products.row_bytes), project, student, weights, byte_budget)


def cross_entropy_rows(
    student: Head, labels: Tensor, weights: Tensor, byte_budget: int | None
) -> tuple[Tensor, Tensor]:
    """``weights @ values`` and the values ``[N]`` of the cross-entropy with ``labels`` ``[N]``."""
    project, labels = Projection(student, ALIGN), labels.contiguous()

    def open_chunk(chunk: slice) -> BlockScorer:
        def score(rows: slice, block: Block) -> None:
            _launch(kernels.cross_entropy_kernel, block, _readable(block.raw, project.head), labels=labels[chunk][rows])

        return score

    return fused(Scorer(open_chunk, 0, 0), project, student, weights, byte_budget)


def _launch(kernel: Any, block: Block, read: tuple[Any, ...], **rest: Any) -> None:
    """Run ``kernel`` on the rows of ``block``: ``read`` is what it reads, its first arguments."""
    num_rows, num_tokens = block.raw.shape
    tile = min(LARGEST_TILE, max(triton.next_power_of_2(num_tokens), 32))
    strides = (0, 0) if block.target is None else block.target.stride()
    with torch.cuda.device_of(block.raw):
        kernel[(num_rows,)](
            *read,
            block.target,
            *strides,
            weights=block.weights,
            values=block.values,
            num_tokens=num_tokens,
            TILE=tile,
            num_warps=max(tile // 256, 1),
            enable_fp_fusion=True,
            **rest,
        )


def _readable(raw: Tensor, head: Head) -> tuple[Any, ...]:
    """A product, its strides, how far its rows can be read, its scale and its softcap, as a kernel takes them."""
    if head.weight is None:
        return raw, *raw.stride(), raw.shape[1], 1.0, None
    return raw, *raw.stride(), raw.stride(0), float(head.scale), None if head.softcap is None else float(head.softcap)


def _form(divergence: Divergence, parameters: Parameters) -> Form:
    """Checks the parameters, as the divergence itself would; defaults are the divergence's."""
    bound = inspect.signature(divergence).bind(None, None, **parameters)
    bound.apply_defaults()
    numbers = dict(list(bound.arguments.items())[2:])
    if divergence is divergences.alpha_beta:
        alpha, beta = numbers.values()
        check_exponents(alpha, beta)
        limit = kernels.alpha_only if beta == 0 else kernels.beta_only if alpha == 0 else kernels.alpha_beta
        return Form(limit, float(alpha), float(beta))
    for name, weight in numbers.items():  # of which there is one at most
        if isinstance(weight, Tensor):
            check_weight(name, weight[:, None])
            return Form(BY_ROW.get(divergence, TERMS[divergence]), per_row=weight.float().contiguous())
        check_weight(name, weight)
        return Form(AT_ZERO.get(divergence, TERMS[divergence]) if weight == 0 else TERMS[divergence], float(weight))
    return Form(TERMS[divergence])


def obstacle(divergence: Divergence | None, parameters: Parameters, *heads: Head) -> str | None:
    """Why the kernels cannot compute ``divergence`` (None: the cross-entropy) of ``heads``, if they cannot."""
    if isinstance(divergence, Bucketed):
        return "has no kernel for top_k"
    if divergence is not None and divergence not in TERMS:
        return f"has no kernel for {getattr(divergence, '__name__', divergence)}"
    if divergence is divergences.alpha_beta and any(isinstance(v, Tensor) for v in parameters.values()):
        return "takes the exponents of alpha_beta as numbers only"
    if any(head.hidden.dtype == torch.float64 for head in heads):
        return "computes in float32, and this is float64"
    if any(head.hidden.device.type == "cpu" for head in heads) and not _interpreted():
        return "needs a GPU"
    return None


def _interpreted() -> bool:
    """Whether Triton was told to interpret kernels, which also works on a CPU."""
    return type(kernels.probe_kernel) is not triton.JITFunction


@cache
def works(device: torch.device) -> bool:
    """Whether a kernel can be compiled and run; a warning says why not."""
    out, probe = torch.zeros(1, device=device), cast(Any, kernels.probe_kernel)
    try:
        with torch.cuda.device_of(out):
            probe[(1,)](out, TERMS=kernels.forward_kl)
    except Exception as error:
        warnings.warn(f"Triton cannot run a kernel here, so losses take impl='chunked': {error}", stacklevel=2)
        return False
    return True
