"""What is minimised. A loss is a tuple of terms; a term gives a SUM and says what it is to be divided by.

Only ``train.py`` divides, by the count over all micro-batches of the step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .divergences import Divergence
from .kernels import linear_cross_entropy, linear_divergence
from .schedules import Schedule, constant
from .scoring import Scored
from .types import Example, Head, Origin

RESPONSES: frozenset[Origin] = frozenset({"data", "student", "teacher"})
TEXT: frozenset[Origin] = frozenset({"text"})
REFERENCES: frozenset[Origin] = frozenset({"data", "teacher"})
STUDENT: frozenset[Origin] = frozenset({"student"})
TEACHER: frozenset[Origin] = frozenset({"teacher"})
ALWAYS = constant(1.0)


@dataclass(frozen=True)
class Term:
    """One part of a loss: ``weight * total / count``, over the rows that have one of ``origins``."""

    name: str
    total: Callable[[Scored], Tensor]
    weight: Schedule = ALWAYS
    origins: frozenset[Origin] = RESPONSES
    per: Literal["token", "sequence"] = "token"
    reads_teacher: bool = False

    def count(self, examples: Sequence[Example]) -> int:
        """What the term is divided by: its target tokens, or its sequences that have any."""
        # The first token of a row is never predicted, so it is no target whatever its mark says.
        targets = [sum(e.targets[1:]) for e in examples if e.origin in self.origins]
        return sum(targets) if self.per == "token" else sum(n > 0 for n in targets)


Loss = tuple[Term, ...]


def _nll(scored: Scored) -> Tensor:
    return linear_cross_entropy(scored.student, scored.labels, torch.ones_like(scored.labels, dtype=torch.float32))


def nll(name: str = "cross_entropy", origins: frozenset[Origin] = RESPONSES) -> Loss:
    """``-log q(y_t | y_<t, x)`` per target token."""
    return (Term(name, _nll, origins=origins),)


def distill(
    divergence: str | Divergence,
    *,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    top_k: int | None = None,
    **parameters: float,
) -> Loss:
    """``D(p, q)`` per target token, p the teacher and q the student, both at ``temperature``.

    ``temperature_squared`` multiplies by its square, which keeps the size of the gradient (Hinton et al., 2015,
    arXiv:1503.02531). ``top_k`` merges all tokens but the teacher's likeliest into one bucket.
    """
    factor = temperature**2 if temperature_squared else 1.0

    def total(scored: Scored) -> Tensor:
        teacher, student = at_temperature(scored, temperature)
        weights = torch.full_like(scored.labels, factor, dtype=torch.float32)
        return linear_divergence(divergence, teacher, student, weights, top_k=top_k, **cast(dict[str, Any], parameters))

    name = divergence if isinstance(divergence, str) else divergence.__name__
    return (Term(name, total, reads_teacher=True),)


def at_temperature(scored: Scored, temperature: float = 1.0) -> tuple[Head, Head]:
    """The teacher's head and the student's, of the logits divided by ``temperature``."""
    assert scored.teacher is not None
    return scored.teacher.at(temperature), scored.student.at(temperature)


def response_log_probs(scored: Scored) -> tuple[Tensor, Tensor]:
    """``log p(y_t)`` and ``log q(y_t)`` of the target tokens, ``[N]`` each and without gradients."""
    heads, ones = at_temperature(scored), torch.ones_like(scored.labels, dtype=torch.float32)
    with torch.no_grad():
        p, q = (-linear_cross_entropy(head, scored.labels, ones, per_row=True)[1] for head in heads)
    return p, q


def scaled(weight: float | Schedule, loss: Loss) -> Loss:
    """``loss`` times ``weight``; a term of weight 0 is not computed."""
    factor = weight if callable(weight) else constant(weight)
    return tuple(replace(t, weight=_times(factor, t.weight)) for t in loss)


def _times(a: Schedule, b: Schedule) -> Schedule:
    return lambda state: a(state) * b(state)
