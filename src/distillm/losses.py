"""What is minimised. A loss is a tuple of terms; a term gives a SUM and says what it is to be divided by.

Only ``train.py`` divides, by the count over all micro-batches of the step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .divergences import Divergence
from .kernels import linear_cross_entropy, linear_divergence
from .schedules import Schedule, constant
from .scoring import Scored
from .types import Example, Origin

RESPONSES: frozenset[Origin] = frozenset({"data", "student", "teacher"})
TEXT: frozenset[Origin] = frozenset({"text"})
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
    ones = torch.ones(len(scored.labels), device=scored.labels.device)
    return linear_cross_entropy(scored.student, scored.labels, ones)


def _divergence(divergence: str | Divergence, parameters: dict[str, float], scored: Scored) -> Tensor:
    assert scored.teacher is not None
    ones = torch.ones(len(scored.labels), device=scored.labels.device)
    return linear_divergence(divergence, scored.teacher, scored.student, ones, **cast(dict[str, Any], parameters))


def nll(name: str = "cross_entropy", origins: frozenset[Origin] = RESPONSES) -> Loss:
    """``-log q(y_t | y_<t, x)`` per target token."""
    return (Term(name, _nll, origins=origins),)


def distill(divergence: str | Divergence, **parameters: float) -> Loss:
    """``D(p, q)`` per target token, p the teacher and q the student."""
    name = divergence if isinstance(divergence, str) else divergence.__name__
    return (Term(name, partial(_divergence, divergence, parameters), reads_teacher=True),)


def scaled(weight: float | Schedule, loss: Loss) -> Loss:
    """``loss`` times ``weight``; a term of weight 0 is not computed."""
    factor = weight if callable(weight) else constant(weight)
    return tuple(replace(t, weight=_times(factor, t.weight)) for t in loss)


def _times(a: Schedule, b: Schedule) -> Schedule:
    return lambda state: a(state) * b(state)
