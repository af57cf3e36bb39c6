"""Divergences between a teacher ``p`` and a student ``q``, per token and from log-probabilities.

Each takes ``[..., V]`` and returns ``[...]``, and neither masks, reduces nor applies a temperature. Mixtures are formed
in log space. Neither a value nor a gradient is ever NaN: a value is ``+inf`` exactly where the true one is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

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


def alpha_beta(p: Tensor, q: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    """``-(1 / ab) sum_v (p^a q^b - a / (a + b) p^(a + b) - b / (a + b) q^(a + b))``. ABKD, arXiv:2505.04560.

    ``a`` and ``b`` are at least 0 and not both 0; a zero stands for the limit: (1, 0) is ``KL(p || q)`` and (0, 1)
    ``KL(q || p)``. ``ValueError`` out of range.
    """
    check_exponents(alpha, beta)
    if beta == 0:
        return _alpha_limit(p, q, alpha)
    if alpha == 0:
        return _alpha_limit(q, p, beta)
    total = alpha + beta
    # Each product in log space, with the mass of the other as its factor: all three are at most 1.
    both, own, other = power(p, alpha, q, beta), power(p, total), power(q, total)
    return ((alpha * own + beta * other) / total - both).sum(-1) / (alpha * beta)


def check_exponents(alpha: float, beta: float) -> None:
    """Raise ``ValueError`` unless ``alpha`` and ``beta`` are at least 0 and not both 0."""
    if alpha < 0 or beta < 0 or alpha + beta == 0:
        raise ValueError(f"alpha is {alpha} and beta {beta}; give numbers of at least 0 that are not both 0")


def power(a: Tensor, exponent: float, b: Tensor | None = None, other: float = 0.0) -> Tensor:
    """``exp(exponent a + other b)``, 0 with a zero gradient where ``a`` or ``b`` is ``-inf``."""
    empty = torch.isneginf(a) if b is None else torch.isneginf(a) | torch.isneginf(b)
    value = exponent * a.masked_fill(empty, 0.0)
    if b is not None:
        value = value + other * b.masked_fill(empty, 0.0)
    return value.exp().masked_fill(empty, 0.0)


def _alpha_limit(a: Tensor, b: Tensor, exponent: float) -> Tensor:
    """``(1 / e^2) sum_v (a^e log(a^e / b^e) - a^e + b^e)``: what remains where the other exponent is 0."""
    no_mass = torch.isneginf(a)
    uncovered = torch.isneginf(b) & ~no_mass
    skipped = no_mass | uncovered
    gap = a.masked_fill(skipped, 0.0) - b.masked_fill(skipped, 0.0)
    a_power = power(a, exponent)
    terms = a_power * exponent * gap - a_power + power(b, exponent)
    return terms.masked_fill(uncovered, math.inf).sum(-1) / exponent**2


def adaptive_kl(p: Tensor, q: Tensor, head_mass: float = 0.5) -> Tensor:
    """``w KL(p || q) + (1 - w) KL(q || p)``, w the head's share of ``sum |p - q|``. AKL, arXiv:2404.02657.

    The head of a row are its likeliest tokens under p, up to the one with which they hold ``head_mass``. The weights
    are held constant: no gradient flows through them. ``ValueError`` for a mass that is not between 0 and 1.
    """
    weight = head_share(p.detach().exp(), q.detach().exp(), head_mass)
    return scaled(weight, kl(p, q)) + scaled(1 - weight, kl(q, p))


def head_share(p: Tensor, q: Tensor, head_mass: float) -> Tensor:
    """The part ``[..., 1]`` of ``sum |p - q|`` that the head of ``p`` has; 0.5 where p = q."""
    if not 0 < head_mass < 1:
        raise ValueError(f"head_mass is {head_mass}; give a number between 0 and 1")
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    in_head = ordered.cumsum(-1) - ordered < head_mass  # the mass before a token: the most likely one is always in
    gaps = (p - q).abs()
    total = gaps.sum(-1, keepdim=True)
    share = (gaps.gather(-1, order) * in_head).sum(-1, keepdim=True) / total.clamp(min=torch.finfo(p.dtype).tiny)
    return torch.where(total > 0, share.clamp(max=1.0), 0.5)


@dataclass(frozen=True)
class Bucketed:
    """``divergence`` on the teacher's ``top_k`` likeliest tokens of each row and one bucket that holds all others.

    Merging tokens never raises an f-divergence. ``ValueError`` for a ``top_k`` below 1.
    """

    divergence: Divergence
    top_k: int

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; give at least 1")

    @property
    def __name__(self) -> str:
        return f"{self.divergence.__name__}_top_{self.top_k}"

    def __call__(self, p: Tensor, q: Tensor, **parameters: float | Tensor) -> Tensor:
        """As ``divergence``, ``[..., V] -> [...]``."""
        if self.top_k + 1 >= p.shape[-1]:
            return self.divergence(p, q, **parameters)
        kept = p.topk(self.top_k).indices
        return self.divergence(with_tail(p, kept), with_tail(q, kept), **parameters)


def with_tail(log_p: Tensor, kept: Tensor) -> Tensor:
    """``log_p`` at ``kept`` ``[..., k]`` and, last, the log of the mass of all others: ``[..., k + 1]``."""
    rest = log_p.scatter(-1, kept, -math.inf)
    none = torch.isneginf(rest).all(-1, keepdim=True)
    # logsumexp of nothing but -inf has a NaN gradient.
    tail = rest.masked_fill(none, 0.0).logsumexp(-1, keepdim=True).masked_fill(none, -math.inf)
    return torch.cat([log_p.gather(-1, kept), tail], -1)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "symmetric_kl": symmetric_kl,
    "alpha_beta": alpha_beta,
    "adaptive_kl": adaptive_kl,
}
"""The divergences that a configuration can name."""
