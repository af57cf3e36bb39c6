"""Divergences between a teacher ``p`` and a student ``q``, per token and from log-probabilities.

Each takes ``[..., V]`` and returns ``[...]``, and neither masks, reduces nor applies a temperature. Mixtures are formed
in log space. Neither a value nor a gradient is ever NaN: a value is ``+inf`` exactly where the true one is.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[..., Tensor]
"""``(p, q, **parameters)``: log-probabilities ``[..., V]``, teacher first, to ``[...]``."""


def kl(a: Tensor, b: Tensor) -> Tensor:
    """``KL(a || b) = sum_v exp(a_v) (a_v - b_v)``: a term is 0 where ``a`` is ``-inf``, ``inf`` where only ``b`` is."""
    no_mass = torch.isneginf(a)
    uncovered = torch.isneginf(b) & ~no_mass
    skipped = no_mass | uncovered
    a, b = a.masked_fill(skipped, 0.0), b.masked_fill(skipped, 0.0)
    # An infinite entry has no slope, and a NaN for one would spoil every parameter of the model: it reports itself in
    # the value, and its gradient is zero. The mask also decides where exp(a) underflows, since 0 * inf is NaN.
    return (a.exp() * (a - b)).masked_fill(uncovered, math.inf).sum(-1)


def mixture(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """``log(weight exp(a) + (1 - weight) exp(b))``; exactly ``b`` at weight 0 and ``a`` at weight 1."""
    if isinstance(weight, Tensor):
        weight = weight.to(a.dtype)
        log_a, log_b = a + weight.log(), b + torch.log1p(-weight)
    else:
        log_a = a + (math.log(weight) if weight > 0 else -math.inf)
        log_b = b + (math.log1p(-weight) if weight < 1 else -math.inf)
    # logaddexp(-inf, -inf) is right, but its gradient is NaN.
    empty = torch.isneginf(log_a) & torch.isneginf(log_b)
    mixed = torch.logaddexp(log_a.masked_fill(empty, 0.0), log_b.masked_fill(empty, 0.0))
    return mixed.masked_fill(empty, -math.inf)


def check_weight(name: str, weight: float | Tensor) -> None:
    """Raise ``ValueError`` unless ``weight`` is a number in [0, 1], or a tensor ``[..., 1]`` of such numbers."""
    if isinstance(weight, Tensor):
        if weight.ndim and weight.shape[-1] != 1:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}; give one per row, of shape [..., 1]")
        # On an accelerator this waits for the device, but only here is the one who gave the tensor still to be told.
        if not bool(((weight >= 0) & (weight <= 1)).all()):
            raise ValueError(f"{name} holds {weight.min().item()} to {weight.max().item()}; give numbers from 0 to 1")
    elif not 0 <= weight <= 1:
        raise ValueError(f"{name} is {weight}; give a number from 0 to 1")


def scaled(weight: float | Tensor, value: Tensor) -> Tensor:
    """``weight * value``, where ``0 * inf = 0``: ``weight`` is a number or ``[..., 1]``, ``value`` ``[...]``."""
    if isinstance(weight, Tensor):
        weight = weight.squeeze(-1).to(value.dtype)
        return torch.where(weight == 0, 0.0, weight * value)
    return weight * value if weight else torch.zeros_like(value)


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    """``KL(p || q)``, ``[..., V] -> [...]``."""
    return kl(p, q)


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    """``KL(q || p)``, ``[..., V] -> [...]``. MiniLLM, arXiv:2306.08543."""
    return kl(q, p)


def jsd(p: Tensor, q: Tensor, beta: float | Tensor = 0.5) -> Tensor:
    """``beta KL(p || m) + (1 - beta) KL(q || m)``, ``m = beta p + (1 - beta) q``. GKD, arXiv:2306.13649.

    ``beta`` is in [0, 1], or one per row ``[..., 1]``; 0 and 1 give the limit, 0. ``ValueError`` out of range.
    """
    check_weight("beta", beta)
    m = mixture(p, q, beta)
    return scaled(beta, kl(p, m)) + scaled(1 - beta, kl(q, m))


def skew_kl(p: Tensor, q: Tensor, alpha: float | Tensor = 0.1) -> Tensor:
    """``KL(p || alpha p + (1 - alpha) q)``; ``alpha = 0`` is ``KL(p || q)``. DistiLLM, arXiv:2402.03898.

    ``alpha`` is in [0, 1], or one per row ``[..., 1]``. ``ValueError`` out of range.
    """
    check_weight("alpha", alpha)
    return kl(p, mixture(p, q, alpha))


def skew_reverse_kl(p: Tensor, q: Tensor, alpha: float | Tensor = 0.1) -> Tensor:
    """``KL(q || (1 - alpha) p + alpha q)``; ``alpha = 0`` is ``KL(q || p)``. DistiLLM, arXiv:2402.03898.

    ``alpha`` is in [0, 1], or one per row ``[..., 1]``. ``ValueError`` out of range.
    """
    check_weight("alpha", alpha)
    return kl(q, mixture(q, p, alpha))


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """``sum_v |p_v - q_v| / 2``, ``[..., V] -> [...]``."""
    return 0.5 * (p.exp() - q.exp()).abs().sum(-1)


def symmetric_kl(p: Tensor, q: Tensor, weight: float | Tensor = 0.5) -> Tensor:
    """``(1 - weight) KL(p || q) + weight KL(q || p)``; DistiLLM's code uses ``weight = 0.9``.

    ``weight`` is in [0, 1], or one per row ``[..., 1]``. ``ValueError`` out of range.
    """
    check_weight("weight", weight)
    return scaled(1 - weight, kl(p, q)) + scaled(weight, kl(q, p))


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "symmetric_kl": symmetric_kl,
}
"""The divergences that a configuration can name."""
