"""DistiLLM-2's loss: skew KL on the teacher's responses, skew reverse KL on the student's. arXiv:2503.07067."""

from typing import Literal

import torch
from torch import Tensor

from .divergences import kl, mixture
from .kernels import linear_divergence
from .losses import Loss, Term, at_temperature, response_log_probs
from .schedules import Schedule, constant, progress
from .scoring import Scored
from .types import Origin, State

SMALLEST_ALPHA = 0.01


def contrastive(
    *,
    alpha: float = 0.1,
    schedule: Literal["paper", "code"] = "paper",
    detach_mixture: bool = False,
    first_epoch: int = 0,
) -> Loss:
    """``(1 - b) SKL`` on the teacher's responses and ``b SRKL`` on the student's, each a mean over tokens, then rows.

    ``paper``: ``b`` is the share of the run that is done, within [0.5, 1]; after the first epoch of ``first_epoch``
    steps every response has a skew of its own (``response_alpha``). ``code``, the authors': both weights 1, one skew
    for all. ``detach_mixture`` stops the gradient inside SRKL's mixture, as the authors' code does.
    """
    weights: tuple[Schedule, Schedule] = constant(1.0), constant(1.0)
    if schedule == "paper":
        weights = (lambda state: 1 - _student_share(state)), _student_share
    reverse = _detached if detach_mixture else "skew_reverse_kl"

    def term(name: str, divergence: object, origin: Origin, weight: Schedule) -> Term:
        def total(scored: Scored) -> Tensor:
            lengths = scored.sequence.bincount(minlength=len(scored.origins))
            per_token = 1.0 / lengths[scored.sequence]
            skew: float | Tensor = alpha
            if schedule == "paper":
                skew = response_alpha(scored, origin, alpha, first_epoch)[scored.sequence]
            teacher, student = at_temperature(scored)
            return linear_divergence(divergence, teacher, student, per_token, alpha=skew)  # pyright: ignore[reportArgumentType]

        return Term(name, total, weight, frozenset({origin}), "sequence", reads_teacher=True)

    return (
        term("skew_kl", "skew_kl", "teacher", weights[0]),
        term("skew_reverse_kl", reverse, "student", weights[1]),
    )


def response_alpha(scored: Scored, origin: Origin, alpha: float, first_epoch: int) -> Tensor:
    """A skew for each row of the batch, ``[B]``: ``1 - (1 - alpha) c / gap``, within [0.01, alpha].

    ``gap`` is how much likelier the response's own writer makes it than the other model: the difference of the
    exponentials of the mean log-probabilities of its tokens. ``c`` is the mean gap over the first epoch, in which the
    skew is ``alpha``.
    """
    rows = len(scored.origins)
    lengths = scored.sequence.bincount(minlength=rows)
    means = (
        torch.zeros(rows, device=lengths.device).index_add_(0, scored.sequence, x.float())
        for x in response_log_probs(scored)
    )
    p, q = ((x / lengths.clamp(min=1)).exp() for x in means)
    gap = (p - q if origin == "teacher" else q - p)[lengths > 0]
    name = f"gap_{origin}"
    scored.figures[name] = gap.sum(), len(gap)
    usual = scored.state.mean(f"first_{name}")
    if scored.state.step < first_epoch:
        scored.figures[f"first_{name}"] = scored.figures[name]
    result = torch.full((rows,), alpha, device=lengths.device)
    if scored.state.step >= first_epoch and usual is not None:
        wide = 1 - (1 - alpha) * usual / torch.where(gap == 0, 1.0, gap)
        result[lengths > 0] = torch.where(gap == 0, alpha, wide).clamp(SMALLEST_ALPHA, alpha)
    return result


def _student_share(state: State) -> float:
    return min(max(progress(state), 0.5), 1.0)


def _detached(p: Tensor, q: Tensor, alpha: float | Tensor) -> Tensor:
    return kl(q, mixture(q.detach(), p, alpha))
