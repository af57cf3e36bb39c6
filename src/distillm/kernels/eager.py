"""The definitions: plain lines of torch that form ``[N, V]`` tensors, which every other implementation must match."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..divergences import Divergence
from ..types import Head

_LEAST = -100.0
"""The log-probability of what a server calls impossible."""
Parameters = Mapping[str, float | Tensor]
"""Of a divergence; a tensor holds one number per row, ``[N]``."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the mathematics after the product: float32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def shape_logits(raw: Tensor, head: Head) -> Tensor:
    """The product ``raw`` ``[n, V]`` with ``head``'s scale and softcap, in float32 (float64 stays)."""
    out = raw.to(wide(raw.dtype))
    if head.weight is None:
        return out
    if head.scale != 1.0:
        out = out * head.scale
    return out if head.softcap is None else head.softcap * torch.tanh(out / head.softcap)


def logits(head: Head) -> Tensor:
    """``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``: ``[N, V]``.

    The product is made in the head's own dtype (or autocast's), all that follows in float32 (float64 stays).
    """
    if head.listed is not None:
        return spread(head.hidden, head.listed)
    raw = head.hidden if head.weight is None else F.linear(head.hidden, head.weight, head.bias)
    return shape_logits(raw, head)


def spread(listed: Tensor, num_tokens: int) -> Tensor:
    """The log-probabilities ``[n, V]`` of rows ``[n, 2 k]`` that list k of them and their tokens.

    What is left of the mass is shared by the other tokens alike: as the tokens listed are the likeliest, none of the
    others passes one of them. Less than what float32 tells from 1 is left of no row, so that nothing is impossible.
    """
    log_p, ids = listed.chunk(2, -1)
    log_p = log_p.clamp(min=_LEAST)
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(log_p.dtype).eps).log()
    others = num_tokens - log_p.shape[-1]
    even = rest - math.log(others) if others > 0 else rest
    return even.expand(-1, num_tokens).scatter(-1, ids.long(), log_p)


def divergence_rows(divergence: Divergence, teacher: Head, student: Head, parameters: Parameters) -> Tensor:
    """``divergence(log p, log q)`` of each row: ``[N]``."""
    with torch.no_grad():
        log_p = logits(teacher).log_softmax(-1)
    columns = {k: v[:, None] if isinstance(v, Tensor) else v for k, v in parameters.items()}
    return divergence(log_p, logits(student).log_softmax(-1), **columns)


def cross_entropy_rows(student: Head, labels: Tensor) -> Tensor:
    """``-log q[label]`` of each row, 0 where the label is ``IGNORE``: ``[N]``."""
    return F.cross_entropy(logits(student), labels, reduction="none")
