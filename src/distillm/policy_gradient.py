"""MiniLLM's loss: the reverse KL of whole responses, by policy gradient. arXiv:2306.08543.

With ``r_t = log p(y_t) - log q(y_t)`` the gradient of the sequence-level ``KL(q || p)`` is the sum of

* the single-step part, ``KL(q || p)`` of the next token, whose gradient is exact, and
* the long part, ``-R_(t+1) grad log q(y_t)``, ``R_(t+1)`` the rewards ``r`` after ``t``,

in expectation over responses of q. Responses that were drawn from another distribution (mixed with the teacher's, or
an older student's) are weighted by how much likelier q makes them.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .kernels import linear_cross_entropy, linear_divergence
from .losses import STUDENT, Loss, Term, at_temperature, response_log_probs
from .scoring import Scored

Importance = Literal["token", "product"]


@dataclass(frozen=True)
class Weights:
    """Of each target token, ``[N]`` each: for the single-step part, for ``grad log q``; the value of the long part."""

    single: Tensor
    long: Tensor
    value: Tensor


def policy_gradient(
    *, importance: Importance = "token", length_normalization: bool = True, clip: float | None = 0.2
) -> Loss:
    """Both parts, per target token of the student's responses.

    ``importance``: ``token`` weighs a token by its own ratio (published, biased, of low variance), ``product`` by the
    ratio of the response up to it (unbiased). ``length_normalization`` divides ``R_(t+1)`` by the number of rewards in
    it. ``clip`` bounds the ratio that the long part gains from, as in PPO (arXiv:1707.06347).
    """

    def total(scored: Scored) -> Tensor:
        found = weigh(scored, importance, length_normalization, clip)
        teacher, student = at_temperature(scored)
        single = linear_divergence("reverse_kl", teacher, student, found.single)
        # The value is the surrogate's, the gradient that of the weighted log-probabilities.
        score = linear_cross_entropy(student, scored.labels, found.long)
        long = score + (found.value.sum() - score).detach()
        parts = {"single_step": single, "long_term": long}
        scored.figures.update({name: (part.detach(), len(scored.labels)) for name, part in parts.items()})
        return single + long

    return (Term("policy_gradient", total, origins=STUDENT, reads_teacher=True),)


def weigh(scored: Scored, importance: Importance, length_normalization: bool, clip: float | None) -> Weights:
    """The weights of the batch's tokens; leaves the mean reward, ratio and share of clipped tokens as figures."""
    log_p, log_q = response_log_probs(scored)
    drawn = log_q if scored.log_probs is None else torch.where(scored.log_probs.isnan(), log_q, scored.log_probs)
    rewards, log_ratio = log_p - log_q, log_q - drawn
    ratio = log_ratio.exp()
    if importance == "product":
        upto = _sums_so_far(log_ratio, scored.sequence).clamp(max=60)  # whose exponential float32 can add up
        # A reward is reached by the tokens up to its own; the choice at t by those before t.
        reached, returns = (upto - log_ratio).exp(), _sums_after(upto.exp() * rewards, scored.sequence)
    else:
        reached, returns = ratio, _sums_after(rewards, scored.sequence)
    if length_normalization:
        returns = returns / _sums_after(torch.ones_like(rewards), scored.sequence).clamp(min=1.0)
    share = 1.0 if importance == "product" else ratio  # the returns of a product hold their ratios already
    gained = share * returns
    kept = torch.ones_like(gained, dtype=torch.bool)
    if clip is not None:
        held = log_ratio.clamp(math.log(1 - clip), math.log(1 + clip))
        bounded = (held - log_ratio).clamp(max=60).exp() * returns if importance == "product" else held.exp() * returns
        kept, gained = gained <= bounded, torch.minimum(gained, bounded)
    long = torch.where(kept, gained, 0.0)
    figures = {"reward": rewards, "importance": ratio, "clipped": (~kept).to(rewards.dtype)}
    scored.figures.update({name: (value.sum(), len(value)) for name, value in figures.items()})
    return Weights(reached, long, -gained)


def _sums_so_far(values: Tensor, sequence: Tensor) -> Tensor:
    """For each token the sum over its sequence up to it, ``[N]``."""
    lengths = sequence.bincount()
    if not len(lengths):
        return values
    at = torch.arange(len(values), device=values.device) - (lengths.cumsum(0) - lengths)[sequence]
    table = values.new_zeros(len(lengths), int(lengths.max()))
    table[sequence, at] = values
    return table.cumsum(1)[sequence, at]


def _sums_after(values: Tensor, sequence: Tensor) -> Tensor:
    """For each token the sum over its sequence after it, ``[N]``."""
    lengths = sequence.bincount()
    totals = values.new_zeros(len(lengths)).index_add_(0, sequence, values)
    return totals[sequence] - _sums_so_far(values, sequence)
