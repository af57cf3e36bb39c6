"""Sources: every row once an epoch, the published share of each kind of batch, nothing remembered but the buffer."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillm.methods import REPLAY_RATIO
from distillm.schedules import constant
from distillm.sources import (
    Draw,
    Replay,
    ReplayBuffer,
    Source,
    beside,
    dataset,
    keyed,
    noisy,
    paired,
    steps_per_epoch,
    student_rows,
)
from distillm.types import Example, State, answer
from rows import row, text_row

ROWS = [row(i, 2, 1) for i in range(13)]


def numbered(prompts: Sequence[Example], state: State, *, steps: Sequence[int] | None = None) -> list[Example]:
    """A fake student: its response says for which step and where in that step's batch it was written."""
    steps = steps or [state.step] * len(prompts)
    places = [i - steps.index(step) for i, step in enumerate(steps)]
    return [
        answer(p, [step, place], "student", state.step) for p, step, place in zip(prompts, steps, places, strict=True)
    ]


def replaying(buffer: ReplayBuffer, phi: float, ratio: Any = 0.5, batch: int = 4, seed: int = 7, **rest: Any) -> Source:
    schedule: Callable[[State], float] = ratio if callable(ratio) else constant(ratio)
    data = dataset(ROWS, batch, seed)
    end_ids = rest.pop("end_ids", [1])
    replay = Replay(buffer, schedule, **rest)
    return student_rows(data, numbered, probability=constant(phi), seed=seed, end_ids=end_ids, replay=replay)


def run(source: Source, steps: int, total: int | None = None) -> list[Draw]:
    return [source(State(step, total or steps)) for step in range(steps)]


def written(draws: Sequence[Draw]) -> int:
    return sum(d.batch == "generated" for d in draws)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 17), st.integers(1, 9), st.integers(0, 3))
def test_each_epoch_visits_each_row_exactly_once(num_rows: int, batch: int, seed: int) -> None:
    examples = [row(i, 1, 1) for i in range(num_rows)]
    source, per_epoch = dataset(examples, batch, seed), steps_per_epoch(num_rows, batch)
    assert per_epoch == math.ceil(num_rows / batch)
    for epoch in range(3):
        batches = [source(State(epoch * per_epoch + i)).rows for i in range(per_epoch)]
        assert sorted(r.id for b in batches for r in b) == sorted(r.id for r in examples)
        assert all(len(b) == batch for b in batches[:-1])


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    batch=st.integers(1, 7),
    bucket=st.integers(2, 9),
    seed=st.integers(0, 99),
)
def test_batches_by_length_visit_each_row_once_and_hold_rows_of_like_length(
    lengths: list[int], batch: int, bucket: int, seed: int
) -> None:
    examples = [row(i, 1, length) for i, length in enumerate(lengths)]
    source, per_epoch = dataset(examples, batch, seed, bucket), steps_per_epoch(len(lengths), batch)
    for epoch in range(2):
        batches = [source(State(epoch * per_epoch + i)).rows for i in range(per_epoch)]
        assert sorted(r.id for b in batches for r in b) == sorted(r.id for r in examples)
        assert sorted(len(b) for b in batches)[1:] == [batch] * (per_epoch - 1)
        if bucket >= per_epoch:  # all rows of the epoch in one: no batch reaches into another's lengths
            spans = sorted((min(len(r.tokens) for r in b), max(len(r.tokens) for r in b)) for b in batches)
            assert all(a[1] <= b[0] for a, b in pairwise(spans))


def test_batches_by_length_pad_less_and_do_not_come_in_order_of_length() -> None:
    examples = [row(i, 1, 1 + i * 7 % 60) for i in range(60)]
    found = {bucket: [dataset(examples, 6, 1, bucket)(State(i)).rows for i in range(10)] for bucket in (1, 5, 10)}
    assert padding(found[10]) < padding(found[5]) < padding(found[1]) / 3
    longest = [max(len(r.tokens) for r in b) for b in found[10]]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def padding(batches: list[list[Example]]) -> int:
    return sum(len(b) * max(len(r.tokens) for r in b) - sum(len(r.tokens) for r in b) for b in batches)


def test_epochs_and_seeds_have_their_own_order_which_history_does_not_change() -> None:
    def order(source: Source, epoch: int) -> list[str]:
        return [r.id for i in range(4) for r in source(State(epoch * 4 + i)).rows]

    source = dataset(ROWS, 4, seed=3)
    orders = [order(source, epoch) for epoch in range(3)]
    assert len({tuple(o) for o in orders}) == 3
    assert order(dataset(ROWS, 4, seed=4), 0) != orders[0]
    backwards = dataset(ROWS, 4, seed=3)
    assert [order(backwards, epoch) for epoch in (2, 0, 1)] == [orders[2], orders[0], orders[1]]


def test_keyed_generators_are_the_same_everywhere() -> None:
    assert keyed(1, "replay", 2).random() == keyed(1, "replay", 2).random()
    assert keyed(1, "replay", 2).random() != keyed(12, "replay", 2).random()
    assert keyed(0, "replay", 0).random() == 0.7669206791271795  # SHA-512 of a text, on any machine and version


@pytest.mark.parametrize("ratio", sorted(REPLAY_RATIO))
@pytest.mark.parametrize("phi", [0.0, 0.15, 0.6, 1.0])
def test_batches_have_their_published_shares(ratio: str, phi: float) -> None:
    total = 4000
    buffer = ReplayBuffer(50)
    buffer.rows.extend(numbered(ROWS, State()))
    draws = run(replaying(buffer, phi, REPLAY_RATIO[ratio]), total)
    anew = [phi * REPLAY_RATIO[ratio](State(step, total)) for step in range(total)]
    shares = {"generated": anew, "replayed": [phi - p for p in anew], "dataset": [1 - phi] * total}
    for kind, probabilities in shares.items():
        count = sum(d.batch == kind for d in draws)
        spread = math.sqrt(sum(p * (1 - p) for p in probabilities))
        assert abs(count - sum(probabilities)) <= 3.2905 * spread + 1e-6, kind  # 99.9 % of a normal distribution
    assert all(d.figures["probability"] == phi for d in draws)
    assert [d.figures["replay_ratio"] for d in draws] == [REPLAY_RATIO[ratio](State(s, total)) for s in range(total)]


def test_one_draw_decides_so_that_a_generating_step_is_always_a_student_step() -> None:
    buffer = ReplayBuffer(50)
    buffer.rows.extend(numbered(ROWS, State()))
    kinds = [d.batch for d in run(replaying(buffer, 0.5, 0.5), 1000)]
    us = [keyed(7, "replay", step).random() for step in range(1000)]
    assert kinds == ["generated" if u < 0.25 else "replayed" if u < 0.5 else "dataset" for u in us]


def test_dataset_batches_are_untouched_and_student_batches_hold_buffer_rows() -> None:
    buffer = ReplayBuffer(20)
    source, data = replaying(buffer, 0.5), dataset(ROWS, 4, 7)
    for step in range(200):
        drawn = source(State(step, 200))
        if drawn.batch == "dataset":
            assert drawn.rows == data(State(step)).rows
        else:
            held = {id(r) for r in buffer.rows}
            assert {id(r) for r in drawn.rows} <= held
            assert len({id(r) for r in drawn.rows}) == len(drawn.rows) == len(data(State(step)).rows)


@pytest.mark.parametrize("capacity", [1, 5, 10, 64])
def test_the_buffer_keeps_the_newest_rows_and_no_more_than_its_capacity(capacity: int) -> None:
    buffer, seen = ReplayBuffer(capacity), list[Example]()

    def watched(prompts: Sequence[Example], state: State, **_: Any) -> list[Example]:
        seen.extend(numbered(prompts, state))
        return numbered(prompts, state)

    replay = Replay(buffer, constant(0.5))
    source = student_rows(dataset(ROWS, 4, 0), watched, probability=constant(0.8), seed=0, end_ids=[1], replay=replay)
    for step in range(120):
        drawn = source(State(step, 120))
        assert list(buffer.rows) == seen[-capacity:] if seen else not buffer.rows
        assert drawn.figures["buffer"] == len(buffer) <= capacity
        assert buffer.full == (len(seen) >= capacity)
        assert drawn.rows
    assert len(seen) > 64


@pytest.mark.parametrize("fill_first", [False, True])
def test_a_buffer_with_less_than_a_batch_is_filled_first(fill_first: bool) -> None:
    capacity, batch = 10, 4
    buffer = ReplayBuffer(capacity)
    # A ratio of 0 never asks for new rows: all that is written is written because the buffer is too small.
    draws = run(replaying(buffer, 1.0, 0.0, batch, fill_first=fill_first), 40)
    filling = 3 if fill_first else 1  # 4 + 4 + 4 >= 10
    assert [d.batch for d in draws] == ["generated"] * filling + ["replayed"] * (40 - filling)
    assert len(buffer) == (capacity if fill_first else batch)


def test_train_on_fresh_trains_on_the_new_rows_themselves() -> None:
    for fresh in (False, True):
        buffer = ReplayBuffer(12)
        buffer.rows.extend(numbered(ROWS, State()))
        draws = run(replaying(buffer, 1.0, 0.5, train_on_fresh=fresh), 60)
        steps = [step for step, d in enumerate(draws) if d.batch == "generated"]
        assert 15 < len(steps) < 45
        current = [all(r.born == step for r in draws[step].rows) for step in steps]
        assert all(current) if fresh else sum(current) < len(current) / 4
        replayed = [r.born < step for step, d in enumerate(draws) if d.batch == "replayed" for r in d.rows]
        assert all(replayed)


@pytest.mark.parametrize("options", [{}, {"fill_first": True}, {"train_on_fresh": True}])
def test_a_step_depends_on_seed_step_and_buffer_only(options: dict[str, bool]) -> None:
    buffer = ReplayBuffer(9)
    source = replaying(buffer, 0.7, 0.4, **options)
    for step in range(60):
        other = ReplayBuffer(9)
        other.rows.extend(buffer.rows)  # what a checkpoint keeps
        resumed = replaying(other, 0.7, 0.4, **options)(State(step, 60))
        assert source(State(step, 60)) == resumed
        assert list(buffer.rows) == list(other.rows)


def test_another_seed_decides_otherwise() -> None:
    kinds = [[d.batch for d in run(replaying(ReplayBuffer(9), 0.5, seed=seed), 50)] for seed in (1, 2)]
    assert kinds[0] != kinds[1]


def test_ages_are_counted_in_steps_since_the_rows_were_written() -> None:
    buffer = ReplayBuffer(8)
    assert buffer.age(5) is None
    buffer.rows.extend([row(0, born=2), row(1, born=5)])
    assert buffer.age(5) == 1.5
    buffer = ReplayBuffer(8)
    draws = run(replaying(buffer, 1.0, 0.0), 6)  # written at step 0, then replayed
    assert [d.figures["buffer_age"] for d in draws] == [0, 1, 2, 3, 4, 5]
    assert run(replaying(ReplayBuffer(8), 0.0), 1)[0].figures["buffer_age"] is None


def test_no_student_rows_are_written_while_the_probability_is_zero() -> None:
    draws = run(replaying(ReplayBuffer(8), 0.0, 1.0, fill_first=True), 50)
    assert {d.batch for d in draws} == {"dataset"}
    assert written(draws) == 0


@pytest.mark.parametrize("fresh", [False, True])
def test_truncated_counts_the_rows_just_written_whatever_is_then_trained_on(fresh: bool) -> None:
    """A row of ``numbered`` ends with its place in the batch, and here two places are end tokens."""
    source = replaying(ReplayBuffer(40), 0.8, 0.5, train_on_fresh=fresh, end_ids=[0, 3])
    draws = run(source, 80)
    assert {d.batch for d in draws} == {"dataset", "generated", "replayed"}
    for drawn in draws:
        cut = sum(place not in (0, 3) for place in range(len(drawn.rows)))
        assert drawn.figures.get("truncated") == (cut if drawn.batch == "generated" else None)
        assert ("truncated" in drawn.figures) == (drawn.batch == "generated")


def test_beside_adds_the_other_rows_and_keeps_the_figures() -> None:
    text = [text_row(i, 5) for i in range(3)]
    both = beside(replaying(ReplayBuffer(8), 1.0), dataset(text, 2, 1))
    drawn = both(State(0, 4))
    assert drawn.batch == "generated"
    assert drawn.figures["buffer"] == 4
    assert [r.origin for r in drawn.rows] == ["student"] * 4 + ["text"] * 2


def test_without_replay_every_student_step_generates_and_nothing_is_kept() -> None:
    source = student_rows(dataset(ROWS, 4, 7), numbered, probability=constant(0.4), seed=7, end_ids=[1])
    draws = run(source, 2000)
    kinds = [d.batch for d in draws]
    assert set(kinds) == {"generated", "dataset"}
    assert abs(kinds.count("generated") - 800) <= 3.2905 * math.sqrt(2000 * 0.4 * 0.6)
    for step, drawn in enumerate(draws):
        assert {r.born for r in drawn.rows} <= {step if drawn.batch == "generated" else 0}
        assert "buffer" not in drawn.figures


def pairing(buffer: ReplayBuffer, log: list[tuple[str, int]]) -> Source:
    def write(who: Any) -> Any:
        def answers(prompts: Sequence[Example], state: State, **_: Any) -> list[Example]:
            log.append((who, len(prompts)))
            return [answer(p, [state.step, i], who, state.step) for i, p in enumerate(prompts)]

        return answers

    return paired(dataset(ROWS, 4, 7), 4, write("student"), write("teacher"), buffer, [1])


def stale(staleness: int, calls: list[int], phi: float = 0.7, ratio: Any = 0.5, **rest: Any) -> Source:
    """A source over a buffer of its own that answers ahead, and notes how many prompts each call is given."""

    def counted(prompts: Sequence[Example], state: State, *, steps: Sequence[int] | None = None) -> list[Example]:
        calls.append(len(prompts))
        return numbered(prompts, state, steps=steps)

    buffer = rest.pop("buffer", None)
    buffer = ReplayBuffer(40) if buffer is None else buffer  # an empty one is false
    schedule = ratio if callable(ratio) else constant(ratio)
    replay = Replay(buffer, schedule, **rest)
    data, phi_ = dataset(ROWS, 4, 7), constant(phi)
    return student_rows(
        data, counted, probability=phi_, seed=7, end_ids=[1],
        replay=replay, ahead=buffer.ahead, max_staleness=staleness,
    )  # fmt: skip


@pytest.mark.parametrize("train_on_fresh", [False, True])
@pytest.mark.parametrize("ratio", ["constant", "decreasing", "increasing"])
def test_writing_ahead_changes_how_old_rows_are_and_nothing_else(ratio: str, train_on_fresh: bool) -> None:
    total, calls = 80, {k: list[int]() for k in (0, 1, 7)}
    draws = {k: run(stale(k, calls[k], ratio=REPLAY_RATIO[ratio], train_on_fresh=train_on_fresh), total) for k in calls}
    for k, found in draws.items():
        assert [d.batch for d in found] == [d.batch for d in draws[0]]
        # Which rows, answered for which step: what a response is does not depend on when it is written.
        assert [[(r.id, r.response) for r in d.rows] for d in found] == [
            [(r.id, r.response) for r in d.rows] for d in draws[0]
        ]
        for step, drawn in enumerate(found):
            for r in drawn.rows:
                if r.origin == "student":
                    assert 0 <= r.response[0] - r.born <= k
                    assert r.response[0] <= step
        assert sum(calls[k]) == sum(calls[0])
    assert len(calls[7]) < len(calls[1]) < len(calls[0])
    assert max(draws[0][i].figures.get("oldest") or 0 for i in range(total)) > 0


def test_rows_written_ahead_are_kept_for_a_resumed_run_and_the_last_step_has_none_left() -> None:
    buffer = ReplayBuffer(40)
    whole, calls = run(stale(5, [], buffer=buffer), 30), list[int]()
    assert not buffer.ahead
    buffer = ReplayBuffer(40)
    source = stale(5, [], buffer=buffer)
    first: list[Draw] = []
    while not buffer.ahead and len(first) < 30:
        first.append(source(State(len(first), 30)))
    assert buffer.ahead
    resumed = ReplayBuffer(40)
    resumed.rows.extend(buffer.rows)
    resumed.ahead.update({step: list(rows) for step, rows in buffer.ahead.items()})
    again = stale(5, calls, buffer=resumed)
    assert first + [again(State(step, 30)) for step in range(len(first), 30)] == whole
    assert sum(calls) < sum(len(d.rows) for d in whole)


def test_a_buffer_that_must_be_filled_is_filled_whatever_was_foreseen() -> None:
    draws = run(stale(9, [], ratio=0.0), 30)
    first = next(d for d in draws if d.batch != "dataset")
    assert first.batch == "generated"


def test_pairs_are_written_once_an_epoch_and_hold_both_writers_for_each_prompt() -> None:
    buffer, log = ReplayBuffer(2 * len(ROWS)), list[tuple[str, int]]()
    draws = run(pairing(buffer, log), 10)
    assert [d.batch for d in draws] == ["generated" if step in (0, 4, 8) else "replayed" for step in range(10)]
    # The last epoch is cut short after two steps, so only their prompts are answered.
    assert log == [("student", 13), ("teacher", 13)] * 2 + [("student", 8), ("teacher", 8)]
    data = dataset(ROWS, 4, 7)
    for step, drawn in enumerate(draws):
        prompts = [r.id for r in data(State(step)).rows]
        assert [r.id for r in drawn.rows] == [i for i in prompts for _ in range(2)]
        assert [r.origin for r in drawn.rows] == ["teacher", "student"] * len(prompts)
        assert {r.born for r in drawn.rows} == {step // 4 * 4}


def test_pairs_go_on_from_the_buffer_and_are_written_again_where_it_lacks_some() -> None:
    buffer, log = ReplayBuffer(2 * len(ROWS)), list[tuple[str, int]]()
    source = pairing(buffer, log)
    draws = [source(State(step, 3)) for step in range(3)]
    other, again = ReplayBuffer(2 * len(ROWS)), list[tuple[str, int]]()
    other.rows.extend(buffer.rows)  # what a checkpoint keeps
    resumed = pairing(other, again)
    assert resumed(State(2, 3)) == draws[2]
    assert not again
    assert resumed(State(3, 8)).batch == "generated"  # the run was made longer
    assert again == [("student", 1), ("teacher", 1)]


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([0.1, 0.3, 1.0]), st.integers(0, 50))
def test_noise_replaces_its_share_of_the_tokens_and_leaves_ends_and_lengths(share: float, seed: int) -> None:
    def generate(prompts: Sequence[Example], state: State, *, steps: Sequence[int] | None = None) -> list[Example]:
        return [answer(p, [7] * 99 + [1], "student", state.step) for p in prompts]

    prompts, state = [row(i, 2, 1) for i in range(40)], State(3)
    wrong = noisy(generate, share, 1000, [1, 2], seed)
    found = wrong(prompts, state)
    assert [r.prompt for r in found] == [p.prompt for p in prompts]
    assert all(r.response[-1] == 1 and len(r.response) == 100 and r.born == 3 for r in found)
    tokens = [token for r in found for token in r.response[:-1]]
    assert not {1, 2} & set(tokens)
    assert max(tokens) < 1000
    # A replaced token is the old one in 1 of 998 draws.
    changed, expected = sum(token != 7 for token in tokens), share * 997 / 998
    assert abs(changed - expected * len(tokens)) <= 3.9 * math.sqrt(len(tokens) * expected * (1 - expected)) + 1e-9
    replaced = [token for token in tokens if token != 7]
    assert abs(sum(replaced) / len(replaced) - 501) < 4.5 * 1000 / math.sqrt(12 * len(replaced))
    # Rows and steps have noise of their own, whatever they are written beside.
    assert wrong(prompts[5:7], state) == found[5:7]
    assert wrong(prompts[5:6], State(1), steps=[3])[0].tokens == found[5].tokens
    assert len({tuple(r.response) for r in (*found, *wrong(prompts, State(4)))}) == 80
