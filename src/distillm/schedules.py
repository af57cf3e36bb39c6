"""Schedules are pure functions of the training state. They hold no state of their own, so resuming restores them."""

import math
from collections.abc import Callable
from typing import Literal

from .types import State

Schedule = Callable[[State], float]
Reference = Literal["previous", "last_increase", "best"]


def progress(state: State) -> float:
    """``t / T`` for the step about to be made, counted from 1, as in algorithm 1 of arXiv:2402.03898."""
    return min(1.0, (state.step + 1) / state.total_steps)


def constant(value: float) -> Schedule:
    """The same value at every step."""
    return lambda state: value


def linear(start: float, end: float) -> Schedule:
    """From ``start`` to ``end`` over the run; ``end`` is reached at the last step."""
    return lambda state: start + (end - start) * progress(state)


def adaptive(
    initial: float = 0.0, increment: float = 0.1, tolerance: float = 0.1, reference: Reference = "previous"
) -> Schedule:
    """The student-generation probability of DistiLLM: raised by ``increment`` whenever validation gets worse.

    Validation gets worse when the monitored value exceeds its reference by more than ``tolerance``:

    * ``previous``: the validation before (the paper, arXiv:2402.03898, algorithm 1);
    * ``last_increase``: the value at the last raise, at first the one before training; equality counts too (the
      authors' code);
    * ``best``: the lowest value so far.

    The first entry of ``state.validation`` is the value before training and is only ever a reference.
    """

    def schedule(state: State) -> float:
        if not state.validation:
            return initial
        probability, against = initial, state.validation[0]
        for value in state.validation[1:]:
            worse = value >= against + tolerance if reference == "last_increase" else value > against + tolerance
            if worse:
                probability = min(probability + increment, 1.0)
            if reference == "previous" or (reference == "last_increase" and worse):
                against = value
            elif reference == "best":
                against = min(against, value)
        return probability

    return schedule


def learning_rate(
    peak: float, shape: Literal["cosine", "linear", "constant"] = "cosine", warmup_steps: int = 0, final: float = 0.0
) -> Schedule:
    """Linear warm-up to ``peak`` over ``warmup_steps``, then ``shape`` down to ``final`` at the last step."""

    def schedule(state: State) -> float:
        if state.step < warmup_steps:
            return peak * (state.step + 1) / warmup_steps
        done = (state.step - warmup_steps) / max(1, state.total_steps - 1 - warmup_steps)
        if shape == "constant":
            return peak
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, done))) if shape == "cosine" else 1 - min(1.0, done)
        return final + (peak - final) * left

    return schedule
