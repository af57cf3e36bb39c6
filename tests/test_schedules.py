"""Schedules against tables worked out by hand."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillm.methods import REPLAY_RATIO
from distillm.schedules import adaptive, constant, learning_rate, linear, progress
from distillm.types import State

# Binary fractions, so that ties are ties: the tolerance is 0.25 and the increment 0.125.
VALUES = [4.0, 4.25, 4.5, 4.75, 4.0, 4.5, 4.25, 3.5, 3.75, 4.0, 4.5]
RAISES = {
    "previous": [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2],
    "last_increase": [0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3],
    "best": [0, 0, 1, 2, 2, 3, 3, 3, 3, 4, 5],
}


def test_progress_counts_the_step_about_to_be_made_from_one() -> None:
    assert [progress(State(step, 4)) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert progress(State(0, 1)) == 1.0
    assert progress(State(9, 4)) == 1.0


@pytest.mark.parametrize("total", [1, 3, 7, 100])
def test_the_published_replay_ratios_are_exact_at_both_ends(total: int) -> None:
    first, last = State(0, total), State(total - 1, total)
    assert REPLAY_RATIO["decreasing"](first) == 1 - 1 / total
    assert REPLAY_RATIO["decreasing"](last) == 0.0
    assert REPLAY_RATIO["increasing"](first) == 1 / total
    assert REPLAY_RATIO["increasing"](last) == 1.0
    assert REPLAY_RATIO["constant"](first) == REPLAY_RATIO["constant"](last) == 0.5


def test_linear_moves_by_equal_parts_to_its_end() -> None:
    schedule = linear(2.0, 4.0)
    assert [schedule(State(step, 4)) for step in range(4)] == [2.5, 3.0, 3.5, 4.0]
    assert constant(0.3)(State(3, 9)) == 0.3


@pytest.mark.parametrize("reference", RAISES)
def test_the_adaptive_probability_follows_the_table(reference: str) -> None:
    schedule = adaptive(0.25, 0.125, 0.25, reference)  # pyright: ignore[reportArgumentType]
    # Every beginning of the history, in an order that would trip a schedule with a memory.
    for length in [11, 3, 7, 1, 2, 9, 4, 5, 10, 6, 8]:
        expected = 0.25 + 0.125 * RAISES[reference][length - 1]
        assert schedule(State(step=length, total_steps=20, validation=VALUES[:length])) == expected


@pytest.mark.parametrize("reference", RAISES)
def test_the_first_validation_is_never_a_reason_to_raise(reference: str) -> None:
    schedule = adaptive(0.3, 0.1, 0.0, reference)  # pyright: ignore[reportArgumentType]
    assert schedule(State()) == 0.3
    assert schedule(State(validation=[100.0])) == 0.3


@pytest.mark.parametrize("reference", RAISES)
def test_the_adaptive_probability_stops_at_one(reference: str) -> None:
    schedule = adaptive(0.9, 0.3, 0.1, reference)  # pyright: ignore[reportArgumentType]
    rising = [float(i) for i in range(6)]
    assert [schedule(State(validation=rising[:n])) for n in range(7)] == [0.9, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_defaults_are_those_of_the_paper() -> None:
    schedule = adaptive()
    assert schedule(State(validation=[2.0, 2.05, 2.1])) == 0.0
    assert schedule(State(validation=[2.0, 1.0, 1.2])) == 0.1  # worse than the one before, not than the first
    assert schedule(State(validation=[2.0, 1.0, 1.2, 1.4])) == 0.2


def test_a_student_that_was_not_tuned_first_is_never_raised_against_its_start() -> None:
    history = [10.0, 3.0, 3.5, 4.0, 4.5]  # gets worse all the time after the first validation
    assert adaptive(reference="last_increase")(State(validation=history)) == 0.0
    assert adaptive(reference="previous")(State(validation=history)) == pytest.approx(0.3)
    assert adaptive(reference="best")(State(validation=history)) == pytest.approx(0.3)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_the_learning_rate_goes_from_peak_to_exactly_final(shape: str) -> None:
    schedule = learning_rate(1e-3, shape, 0, 1e-7)  # pyright: ignore[reportArgumentType]
    rates = [schedule(State(step, 11)) for step in range(11)]
    assert rates[0] == pytest.approx(1e-3, rel=1e-12)
    assert rates[5] == pytest.approx((1e-3 + 1e-7) / 2)
    assert rates[10] == 1e-7
    assert all(a > b for a, b in itertools.pairwise(rates))


def test_the_cosine_is_a_cosine() -> None:
    schedule = learning_rate(2.0, "cosine", 2, 1.0)
    rates = [schedule(State(step, 7)) for step in range(7)]
    expected = [1.0, 2.0, 2.0, 1.5 + 0.5 * math.sqrt(0.5), 1.5, 1.5 - 0.5 * math.sqrt(0.5), 1.0]
    assert rates == pytest.approx(expected)


def test_warm_up_rises_by_equal_parts_and_then_the_shape_begins() -> None:
    rates = [learning_rate(0.8, "linear", 4)(State(step, 9)) for step in range(9)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert rates[3] == 0.8
    assert rates[8] == 0.0


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(["cosine", "linear", "constant"]),
    st.integers(1, 40),
    st.integers(0, 45),
    st.floats(1e-6, 1.0),
    st.floats(0, 1, allow_subnormal=False),
)
def test_learning_rates_stay_between_final_and_peak(
    shape: str, total: int, warmup: int, peak: float, share: float
) -> None:
    schedule = learning_rate(peak, shape, warmup, peak * share)  # pyright: ignore[reportArgumentType]
    rates = [schedule(State(step, total)) for step in range(total)]
    assert all(0 < rate <= peak * (1 + 1e-12) or share == 0 for rate in rates)
    assert rates[:warmup] == pytest.approx([peak * (i + 1) / warmup for i in range(min(warmup, total))])
    after = rates[warmup:]
    assert all(a >= b for a, b in itertools.pairwise(after))
    if after:
        assert after[0] == pytest.approx(peak)  # a single step after the warm-up is one at the peak
    if len(after) > 1:
        assert after[-1] == (peak if shape == "constant" else pytest.approx(peak * share, rel=1e-12))
