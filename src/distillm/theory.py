"""What the theory of skew divergences says, computed: figure 3 of DistiLLM (arXiv:2402.03898) and theorem 1."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .divergences import DIVERGENCES

SKEWED = ("skew_kl", "skew_reverse_kl")
COEFFICIENTS = ("forward_kl", "reverse_kl", *SKEWED)


def gradient_coefficient(name: str, p: Tensor, q: Tensor, alpha: float = 0.1) -> Tensor:
    """What multiplies ``grad q`` of a token in the gradient of a divergence, elementwise for probabilities p and q.

    ``forward_kl``: ``-p / q``; ``reverse_kl``: ``log(q / p) + 1``; ``skew_kl``: ``-(1 - a) p / m`` with
    ``m = a p + (1 - a) q``; ``skew_reverse_kl``: ``log(q / m) + 1 - a q / m`` with ``m = (1 - a) p + a q``.
    ``ValueError`` for another name.
    """
    if name == "forward_kl":
        return -p / q
    if name == "reverse_kl":
        return (q / p).log() + 1
    if name == "skew_kl":
        return -(1 - alpha) * p / (alpha * p + (1 - alpha) * q)
    if name == "skew_reverse_kl":
        m = (1 - alpha) * p + alpha * q
        return (q / m).log() + 1 - alpha * q / m
    raise ValueError(f"no coefficient is known of {name!r}; choose one of {', '.join(COEFFICIENTS)}")


def estimator_error(
    name: str, p: Tensor, q: Tensor, alpha: float, samples: int, trials: int, generator: torch.Generator
) -> float:
    """``E |D(p_n, q_n) - D(p, q)|^2``, p_n and q_n the frequencies of ``samples`` draws of each."""
    drawn = [
        torch.zeros(trials, len(x), dtype=p.dtype).scatter_add_(
            1,
            torch.multinomial(x.expand(trials, -1), samples, replacement=True, generator=generator),
            torch.ones(trials, samples, dtype=p.dtype),
        )
        / samples
        for x in (p, q)
    ]
    found = DIVERGENCES[name](drawn[0].log(), drawn[1].log(), alpha=alpha)
    true = DIVERGENCES[name](p.log(), q.log(), alpha=alpha)
    return float((found - true).square().mean())


def error_bound(p: Tensor, q: Tensor, alpha: float, samples: int) -> float:
    """The bound of theorem 1 with its unpublished constants set to 1: its shape in ``alpha`` and ``samples``.

    ``c / n^2 + log^2(a n) / n + log^2(n) / (a^2 n)``, ``c = min(1 / a^2, chi^2(p, q)^2 / (1 - a)^2)``, proved for
    ``a < 1/8``.
    """
    chi = float(((p - q).square() / q).sum())
    first = min(1 / alpha**2, chi**2 / (1 - alpha) ** 2) / samples**2
    return first + math.log(alpha * samples) ** 2 / samples + math.log(samples) ** 2 / (alpha**2 * samples)


def normalized(alpha: float, squared: float) -> float:
    """``squared`` after dividing what it is the square of by the size of the gradient, ``1 - alpha``."""
    return squared / (1 - alpha) ** 2


def synthetic_pair(size: int, sharpness: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A teacher's and a student's distribution over ``size`` tokens, from normal logits."""
    p, shift = (sharpness * torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    return p.softmax(-1), (p + shift).softmax(-1)


def synthetic_training(
    name: str, alpha: float, *, steps: int, batch: int, size: int, sharpness: float, rate: float, seed: int
) -> list[float]:
    """The norm of the gradient at each step of fitting student logits to random teachers, ``batch`` of 64 at a time."""
    generator = torch.Generator().manual_seed(seed)
    p = (sharpness * torch.randn(64, size, generator=generator, dtype=torch.float64)).log_softmax(-1)
    z = (sharpness * torch.randn(64, size, generator=generator, dtype=torch.float64)).requires_grad_()
    norms: list[float] = []
    for _ in range(steps):
        rows = torch.randperm(64, generator=generator)[:batch]
        loss = DIVERGENCES[name](p[rows], z[rows].log_softmax(-1), alpha=alpha).mean()
        (gradient,) = torch.autograd.grad(loss, z)
        norms.append(gradient.norm().item())
        with torch.no_grad():
            z -= rate * gradient / (1 - alpha)  # as an optimizer that normalizes the gradient would
    return norms


def mean_and_variance(values: Sequence[float]) -> tuple[float, float]:
    """The mean of ``values`` and their variance about it."""
    found = torch.tensor(values, dtype=torch.float64)
    return found.mean().item(), found.var(correction=0).item()
