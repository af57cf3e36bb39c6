"""The named divergences with their gradients in closed form, for blocks of rows small enough to stay in cache.

Each takes a block's log-probabilities and probabilities ``[n, V]`` and returns the values ``[n]`` and a function that
makes ``G = d value / d log q`` ``[n, V]``, which is not called when no gradient is wanted. Terms of ``G`` proportional
to ``q`` may be left out: the softmax takes them away. ``log 0`` comes in as ``FLOOR``.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import divergences
from ..divergences import Bucketed, Divergence, check_exponents, check_weight, head_share, scaled, with_tail
from .eager import Parameters

FLOOR = -1e30
"""Stands for ``log 0``: finite, so that ``0 * log 0`` is 0 and not NaN; far below the log-probability of any logits."""

Scored = tuple[Tensor, Callable[[], Tensor]]
ClosedForm = Callable[..., Scored]


def forward_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Scored:
    """``G = -p``, and 0 where the value is infinite."""
    gap = log_p - log_q
    uncovered = gap > -FLOOR / 2
    values = gap.mul_(p).sum(-1).masked_fill_(uncovered.any(-1), math.inf)
    return values, lambda: p.neg().masked_fill_(uncovered, 0.0)


def reverse_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Scored:
    """``G = q (log(q / p) + 1)``, and 0 where the value is infinite."""
    gap = log_q - log_p
    uncovered = gap > -FLOOR / 2
    terms = gap.mul_(q)
    values = terms.sum(-1).masked_fill_(uncovered.any(-1), math.inf)
    return values, lambda: terms.add_(q).masked_fill_(uncovered, 0.0)


def skew_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, alpha: float | Tensor = 0.1) -> Scored:
    """``G = -(1 - alpha) p q / m``, ``m = alpha p + (1 - alpha) q``."""
    check_weight("alpha", alpha)
    if not isinstance(alpha, Tensor) and alpha == 0:
        return forward_kl(log_p, log_q, p, q)
    m = _mixture(p, q, alpha)
    values = _kl_terms(p, log_p, m.log()).sum(-1)
    return values, lambda: torch.div(q, m, out=m).mul_(p).mul_(alpha - 1)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, alpha: float | Tensor = 0.1) -> Scored:
    """``G = q (log(q / m) - alpha q / m)``, ``m = (1 - alpha) p + alpha q``."""
    check_weight("alpha", alpha)
    if not isinstance(alpha, Tensor) and alpha == 0:
        return reverse_kl(log_p, log_q, p, q)
    m = _mixture(q, p, alpha)
    terms = _kl_terms(q, log_q, m.log())
    return terms.sum(-1), lambda: terms.addcmul_(torch.div(q, m, out=m).mul_(alpha), q, value=-1)


def jsd(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, beta: float | Tensor = 0.5) -> Scored:
    """``G = (1 - beta) q log(q / m)``, ``m = beta p + (1 - beta) q``."""
    check_weight("beta", beta)
    log_m = _mixture(p, q, beta).log_()
    terms = (log_q - log_m).mul_(q)
    values = scaled(beta, _kl_terms(p, log_p, log_m).sum(-1)) + scaled(1 - beta, terms.sum(-1))
    return values, lambda: terms.mul_(1 - beta)


def total_variation(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Scored:
    """``G = q sign(q - p) / 2``."""
    difference = q - p
    return difference.abs().sum(-1).mul_(0.5), lambda: difference.sign_().mul_(q).mul_(0.5)


def symmetric_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, weight: float | Tensor = 0.5) -> Scored:
    """``G = (1 - weight) G_forward + weight G_reverse``."""
    check_weight("weight", weight)
    forward, forward_gradient = forward_kl(log_p, log_q, p, q)
    reverse, reverse_gradient = reverse_kl(log_p, log_q, p, q)
    values = scaled(1 - weight, forward) + scaled(weight, reverse)
    return values, lambda: forward_gradient().mul_(1 - weight).add_(reverse_gradient().mul_(weight))


def alpha_beta(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Scored:
    """``G = (q^(a + b) - p^a q^b) / a``, ``q^b log(q / p)`` at ``a = 0``, and 0 where the value is infinite."""
    check_exponents(alpha, beta)
    if alpha == 0 or beta == 0:
        return _alpha_limit(log_p, log_q, alpha) if beta == 0 else _beta_limit(log_p, log_q, beta)
    total = alpha + beta
    both = torch.mul(log_p, alpha).add_(log_q, alpha=beta).exp_()
    other = torch.mul(log_q, total).exp_()
    own = torch.mul(log_p, total).exp_().mul_(alpha).add_(other, alpha=beta).div_(total).sub_(both)
    return own.sum(-1).div_(alpha * beta), lambda: other.sub_(both).div_(alpha)


def _alpha_limit(log_p: Tensor, log_q: Tensor, alpha: float) -> Scored:
    gap = log_p - log_q
    uncovered = gap > -FLOOR / 2
    own, other = torch.mul(log_p, alpha).exp_(), torch.mul(log_q, alpha).exp_()
    values = gap.mul_(own).mul_(alpha).add_(other).sub_(own).sum(-1).div_(alpha**2)
    return (
        values.masked_fill_(uncovered.any(-1), math.inf),
        lambda: other.sub_(own).div_(alpha).masked_fill_(uncovered, 0.0),
    )


def _beta_limit(log_p: Tensor, log_q: Tensor, beta: float) -> Scored:
    gap = log_q - log_p
    uncovered = gap > -FLOOR / 2
    own, other = torch.mul(log_p, beta).exp_(), torch.mul(log_q, beta).exp_()
    terms = gap.mul_(other)
    values = torch.mul(terms, beta).add_(own).sub_(other).sum(-1).div_(beta**2)
    return values.masked_fill_(uncovered.any(-1), math.inf), lambda: terms.masked_fill_(uncovered, 0.0)


def adaptive_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, head_mass: float = 0.5) -> Scored:
    """That of ``symmetric_kl``, each row with its own weight."""
    return symmetric_kl(log_p, log_q, p, q, 1 - head_share(p, q, head_mass))


def _bucketed(
    form: ClosedForm, top_k: int, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, **parameters: float | Tensor
) -> Scored:
    """``form`` on the kept tokens and the bucket, whose ``G`` its tokens share by their part of its mass."""
    if top_k + 1 >= log_p.shape[-1]:
        return form(log_p, log_q, p, q, **parameters)
    kept = log_p.topk(top_k).indices
    coarse_p, coarse_q = (with_tail(x, kept).clamp_(min=FLOOR) for x in (log_p, log_q))
    mass = coarse_q.exp()
    tail = mass[:, -1:].clamp(min=torch.finfo(mass.dtype).tiny)
    values, make = form(coarse_p, coarse_q, coarse_p.exp(), mass, **parameters)

    def gradient() -> Tensor:
        g = make()
        return torch.mul(q, g[:, -1:] / tail).scatter_(-1, kept, g[:, :-1])

    return values, gradient


def _mixture(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """``weight a + (1 - weight) b``, at least the smallest normal number so that its logarithm is finite."""
    return torch.lerp(b, a, weight).clamp_(min=torch.finfo(a.dtype).tiny)


def _kl_terms(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """``a (log a - log b)``, written over ``log_b``."""
    return torch.sub(log_a, log_b, out=log_b).mul_(a)


CLOSED_FORMS: dict[Divergence, ClosedForm] = {
    divergences.forward_kl: forward_kl,
    divergences.reverse_kl: reverse_kl,
    divergences.jsd: jsd,
    divergences.skew_kl: skew_kl,
    divergences.skew_reverse_kl: skew_reverse_kl,
    divergences.total_variation: total_variation,
    divergences.symmetric_kl: symmetric_kl,
    divergences.alpha_beta: alpha_beta,
    divergences.adaptive_kl: adaptive_kl,
}


def closed_form(divergence: Divergence, parameters: Parameters) -> ClosedForm | None:
    """The closed form of ``divergence``, or None where it has none that holds for ``parameters``."""
    if isinstance(divergence, Bucketed):
        form = closed_form(divergence.divergence, parameters)
        return form and partial(_bucketed, form, divergence.top_k)
    form = CLOSED_FORMS.get(divergence)
    if form in (skew_kl, skew_reverse_kl):
        # Rows of weight 0 need the mixture in log space: in probability space it underflows where the other has mass.
        alpha = parameters.get("alpha")
        if isinstance(alpha, Tensor) and bool((alpha == 0).any()):
            return None
    return form
